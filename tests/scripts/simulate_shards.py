"""Simulates runs of 10^5 shards on workers that fail, and compares them with the formulas of docs/plan.py.

The protocol is that of `t5gemma batch` under a scheduler: a shard's output appears at once and complete under its name, or not at
all; whoever begins a shard looks for its output first; a failed shard is begun again, up to some retries; what is left after that
is left to a second run of the same command. A worker can fail

  - while it computes: nothing has appeared;
  - after the output has appeared, before the scheduler knows: the next attempt finds it;
  - for the scheduler only: it is cut off, computes on, and its output appears beside, before or after that of its successor.

Seeded: every run of this script simulates the same.
"""

import collections
import heapq
import math
import pathlib
import random
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "docs"))
from plan import Speed, plan

REPORT = 1.0
"""Seconds between the appearance of an output and the scheduler's knowledge of it, within the shard's time."""
FOUND = 1.0
"""Seconds of an attempt that finds the output: it opens no model."""
CUT_OFF = 0.2
"""The share of failures that only the scheduler sees."""
STARTED, APPEARS, REPORTED, FAILED, RESTARTED = range(5)


class Outputs:
    """The output folder: a name holds nothing or one complete output."""

    def __init__(self):
        self.files = {}
        self.replaced = 0

    def rename_into(self, shard):
        # The same input, model and options give the same bytes, so it does not matter whose are kept.
        self.replaced += shard in self.files
        self.files[shard] = content(shard)

    def abandon(self, shard):
        """A worker fails that had not finished: what it has written lies aside, under a name that nobody asks for."""

    def complete(self, shards):
        """Whether each shard has one output, and a whole one."""
        return sorted(self.files) == list(range(shards)) and all(found == content(shard) for shard, found in self.files.items())


class InPlace(Outputs):
    """What must not be done: outputs that are written under their own name."""

    def abandon(self, shard):
        self.files.setdefault(shard, "half of it")


def content(shard):
    return f"the results of {shard}"


def run(speed, size, shards, workers, retries, outputs, rng):
    """One run of the command: its seconds, the worker seconds, those that outputs saved which were there already, the failures,
    and the shards that were given up."""
    events, order = [], 0
    waiting, attempts = collections.deque(range(shards)), collections.Counter()
    done, given_up = set(), set()
    busy = saved = failures = 0
    end = 0.0

    def at(time, *what):
        nonlocal order
        order += 1
        heapq.heappush(events, (time, order, *what))

    def begin(time):
        """A worker that is free takes a shard."""
        nonlocal busy, saved
        if not waiting:
            return
        shard = waiting.popleft()
        attempts[shard] += 1
        is_there = shard in outputs.files
        seconds = FOUND if is_there else speed.seconds(size)
        saved += speed.seconds(size) - seconds
        fails = rng.expovariate(1 / speed.between_failures)
        if not is_there and (fails > seconds - REPORT or rng.random() < CUT_OFF):
            at(time + seconds - REPORT, APPEARS, shard)
        busy += min(fails, seconds)
        at(time + min(fails, seconds), FAILED if fails < seconds else REPORTED, shard)

    for _ in range(workers):
        begin(0.0)
    while events:
        time, _, what, shard = heapq.heappop(events)
        if what == APPEARS:
            outputs.rename_into(shard)
            continue
        end = time
        if what == REPORTED:
            assert shard not in done and shard in outputs.files, shard
            done.add(shard)
            begin(time)
        elif what == FAILED:
            failures += 1
            outputs.abandon(shard)
            busy += speed.restart
            at(time + speed.restart, RESTARTED, shard)
        else:
            if attempts[shard] <= retries:
                waiting.appendleft(shard)
            else:
                given_up.add(shard)
            begin(time)
    assert done | given_up == set(range(shards)) and not done & given_up
    return end, busy, saved, failures, given_up


def near(name, found, expected, tolerance):
    assert abs(found - expected) <= tolerance, f"{name}: expected {expected:.6g} ± {tolerance:.3g}, found {found:.6g}"


def check(name, speed, shards, workers, retries, seed):
    rng, outputs = random.Random(seed), Outputs()
    size = speed.best_shard
    expected = plan(speed, shards * size, workers, retries=retries)
    seconds, busy, saved, failures, given_up = run(speed, size, shards, workers, retries, outputs, rng)
    # Five standard deviations of sums of so many independent attempts.
    p = speed.chance_of_failure(size)
    spread = 5 * math.sqrt(expected.failures) / (1 - p)
    # The formulas know no output that is there although its worker has failed.
    near(f"{name}: worker seconds", busy + saved, expected.worker_seconds, spread * (expected.shard_seconds + speed.restart))
    found_there = saved / (expected.shard_seconds - FOUND)
    near(f"{name}: failures", failures, expected.failures, spread + found_there * p)
    near(f"{name}: given up", len(given_up), expected.given_up, 5 * math.sqrt(expected.given_up) + 1)
    computed = (shards - len(given_up)) * size / speed.documents_per_second
    near(f"{name}: lost share", 1 - computed / (busy + saved), expected.lost, 0.005)
    least = expected.worker_seconds / workers
    least -= saved / workers
    assert least * 0.99 <= seconds <= expected.seconds * 1.01, f"{name}: {least:.6g} <= {seconds:.6g} <= {expected.seconds:.6g}"
    # The same command again computes what is left, and nothing else.
    runs, left = 1, len(given_up)
    while given_up:
        before = len(given_up)
        *_, given_up = run(speed, size, shards, workers, retries, outputs, rng)
        assert len(given_up) < before, "the next run makes progress"
        runs += 1
    assert outputs.complete(shards)
    print(
        f"{name}: {shards} shards of {expected.shard_seconds / 60:.0f} min, {workers} workers: {seconds / 3600:.1f} h (planned "
        f"{expected.seconds / 3600:.1f} h), {failures} failures ({expected.failures:.0f}), {1 - computed / busy:.2%} lost "
        f"({expected.lost:.2%}), {left} given up ({expected.given_up:.2g}), complete after {runs} runs, "
        f"{outputs.replaced} outputs written twice"
    )


def best_size():
    """Young's size costs within a hundredth of the best of all sizes."""
    for start, hours in ((1, 1), (10, 24), (60, 2), (300, 24 * 30)):
        speed = Speed(3.0, start, hours * 3600)
        cost = lambda documents: speed.expected_seconds(documents) / documents  # noqa: E731
        best = min(cost(speed.best_shard * 1.05**power) for power in range(-60, 60))
        assert best <= cost(speed.best_shard) <= 1.01 * best, (start, hours)


def broken_protocol():
    """Without the rename, the simulation finds halves."""
    speed, outputs = Speed(3.4, between_failures=2 * 3600), InPlace()
    run(speed, speed.best_shard, 1000, 100, 3, outputs, random.Random(4))
    assert not outputs.complete(1000)


def command_line():
    """The calculator prints what its functions return, and refuses what it cannot calculate with."""
    script = pathlib.Path(__file__).resolve().parents[2] / "docs/plan.py"
    run = lambda *words: subprocess.run([sys.executable, script, *words], capture_output=True, text=True)  # noqa: E731
    asked = ["--documents", "1e9", "--workers", "1000"]
    made = plan(Speed(4), 1e9, 1000)
    printed = run(*asked, "--documents-per-second", "4", "--price-per-hour", "2").stdout
    for expected in (f"{made.shards:,}", f"{made.seconds / 3600:,.0f}", f"{made.worker_seconds / 3600 * 2:,.0f}", f"{made.lost:.1%}"):
        assert expected in printed.split(), (expected, printed)
    by_tokens = ["--source-tokens", "100", "--new-tokens", "10", "--encoded-per-second", "800", "--decoded-per-second", "80"]
    assert run(*asked, *by_tokens, "--price-per-hour", "2").stdout == printed
    for wrong in ([], by_tokens[:6], [*by_tokens, "--documents-per-second", "4"], ["--documents-per-second", "-1"]):
        done = run(*asked, *wrong)
        assert done.returncode == 2 and "--documents-per-second" in done.stderr, done


def main():
    command_line()
    best_size()
    broken_protocol()
    check("steady", Speed(3.4, start=10, between_failures=24 * 3600, restart=120), 100_000, 1000, 3, seed=1)
    check("preempted", Speed(3.4, start=30, between_failures=2 * 3600, restart=300), 100_000, 1000, 3, seed=2)
    check("hardly alive", Speed(3.4, start=60, between_failures=900, restart=60), 100_000, 5000, 1, seed=3)
    print("well")


if __name__ == "__main__":
    main()
