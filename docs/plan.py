#!/usr/bin/env python3
"""Plans a run over many documents: shards, workers, time, lost work and cost, from measured speed and failure rates.

    docs/plan.py --documents 1e9 --documents-per-second 3.4 --workers 1000

A run is `shards` independent pieces of work. A worker (a process, with its cores or its GPU) takes a shard, computes it from its
beginning, and takes the next one. If the worker fails, the shard's work is lost, and a worker starts it again. With

    x  seconds of a shard without failures: seconds to start + documents of the shard / documents per second
    F  seconds between two failures of a worker, exponentially distributed
    r  seconds until a failed shard is started again

the formulas are these. tests/scripts/simulate_shards.py compares them with a simulation.

    T = (F + r) (exp(x / F) - 1)       expected seconds of a shard, failures included. The number of failed attempts is geometric
                                       with mean exp(x / F) - 1, each costs what was done until it failed and then r, and the sum
                                       is this; J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart
                                       dumps, Future Generation Computer Systems 22 (2006), where a shard is the interval.
    w = sqrt(2 start F)                seconds of computing in the best shard, to first order: shorter ones start too often, longer
                                       ones lose too much; J. W. Young, A first order approximation to the optimum checkpoint
                                       interval, Communications of the ACM 17 (1974).
    shards T / workers                 seconds until no shard is left to be taken, and then at most
    T_last                             until the last one is done, as no worker is idle before (R. L. Graham, Bounds on
                                       multiprocessing timing anomalies, SIAM Journal on Applied Mathematics 17, 1969). The
                                       unluckiest of the last shards fails about ln(workers) / ln(1 / p) times, where
    p = 1 - exp(-x / F)                is the chance that an attempt fails.
    shards p^(retries + 1)             shards that are given up, and left to the next run of the same command.

Standard library only.
"""

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """What one worker does, and how long it lives."""

    documents_per_second: float
    start: float = 10.0
    """Seconds from the begin of a shard to its first document: the scheduler, the program, opening the model."""
    between_failures: float = 86400.0
    restart: float = 120.0

    @property
    def best_shard(self) -> int:
        """Documents of a shard, by Young's formula."""
        return max(1, round(math.sqrt(2 * self.start * self.between_failures) * self.documents_per_second))

    def seconds(self, documents: float) -> float:
        """x: of a shard without failures."""
        return self.start + documents / self.documents_per_second

    def expected_seconds(self, documents: float) -> float:
        """T: of a shard with failures."""
        return (self.between_failures + self.restart) * math.expm1(self.seconds(documents) / self.between_failures)

    def chance_of_failure(self, documents: float) -> float:
        """p: of one attempt."""
        return -math.expm1(-self.seconds(documents) / self.between_failures)


@dataclass(frozen=True)
class Plan:
    shard_documents: int
    shards: int
    shard_seconds: float
    """Without failures."""
    worker_seconds: float
    """Of all workers together, with failures."""
    lost: float
    """The share of these that is not computing: starting, lost attempts, waiting for restarts."""
    seconds: float
    """From the beginning to the end of the run."""
    failures: float
    """Expected, of workers."""
    given_up: float
    """Expected shards that fail in every attempt."""


def plan(speed: Speed, documents: float, workers: int, shard_documents: int | None = None, retries: int = 3) -> Plan:
    size = shard_documents or speed.best_shard
    shards = math.ceil(documents / size)
    each, p = speed.expected_seconds(size), speed.chance_of_failure(size)
    given_up = p ** (retries + 1)
    last = (speed.seconds(size) + speed.restart) * (1 + math.log(workers) / math.log(1 / p))
    return Plan(
        shard_documents=size,
        shards=shards,
        shard_seconds=speed.seconds(size),
        # An attempt costs each * (1 - p), and a shard has (1 - given_up) / (1 - p) of them.
        worker_seconds=shards * each * (1 - given_up),
        lost=1 - size / speed.documents_per_second / each,
        seconds=shards * each * (1 - given_up) / workers + last,
        failures=shards * p / (1 - p) * (1 - given_up),
        given_up=shards * given_up,
    )


def documents_per_second(source_tokens: float, new_tokens: float, encoded_per_second: float, decoded_per_second: float) -> float:
    """The documents a second of a worker, from the tokens a second that it encodes and decodes."""
    return 1 / (source_tokens / encoded_per_second + new_tokens / decoded_per_second)


def measured(results: dict, kind: str) -> tuple[float, float]:
    """Tokens a second, encoding and decoding, of this project in a file of docs/results: of one source of 512 tokens, and of 8
    rows, greedy, without what encoding them takes."""
    cases = {case["case"]: case[kind]["t5gemma"] for case in results["cases"]}
    decoding = cases["8 rows greedy"] - cases["encode the 8 rows"]
    new = results["new_tokens"]
    new = new[kind] if isinstance(new, dict) else new
    return 512 / cases["encode 512 tokens"] * 1000, 8 * new / decoding * 1000


def shown(name: str, value: str) -> str:
    return f"{name:34}{value:>16}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=float, required=True)
    add("--workers", type=int, required=True, help="processes that compute at the same time")
    add("--documents-per-second", type=float, help="of one worker, measured on one shard")
    add("--source-tokens", type=float, help="of a document; with --new-tokens and both speeds instead of --documents-per-second")
    add("--new-tokens", type=float, help="generated for a document")
    add("--encoded-per-second", type=float, help="source tokens that a worker encodes")
    add("--decoded-per-second", type=float, help="tokens that a worker generates, all rows together")
    add("--shard-documents", type=int, help="documents of a shard [default: the best number]")
    add("--start-seconds", type=float, default=10, help="until a shard's first document is computed [default: 10]")
    add("--hours-between-failures", type=float, default=24, help="of one worker, preemptions included [default: 24]")
    add("--restart-seconds", type=float, default=120, help="until a failed shard is started again [default: 120]")
    add("--retries", type=int, default=3, help="of a failed shard [default: 3]")
    add("--price-per-hour", type=float, help="of one worker")
    given = parser.parse_args()
    rate, tokens = given.documents_per_second, ("source_tokens", "new_tokens", "encoded_per_second", "decoded_per_second")
    counts = [getattr(given, name) for name in tokens]
    if rate is None and None not in counts:
        rate = documents_per_second(*counts)
    elif rate is None or counts != [None] * 4:
        flags = ", ".join("--" + name.replace("_", "-") for name in tokens)
        parser.error(f"expected --documents-per-second, or all of {flags}")
    positive = ("documents", "workers", "start_seconds", "hours_between_failures")
    for name, value in (("documents_per_second", rate), *((name, getattr(given, name)) for name in positive)):
        if not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, found {value:g}")
    speed = Speed(rate, given.start_seconds, given.hours_between_failures * 3600, given.restart_seconds)
    made = plan(speed, given.documents, given.workers, given.shard_documents, given.retries)
    print(shown("documents a second, one worker", f"{rate:.3g}"))
    print(shown("documents of a shard", number(made.shard_documents)))
    print(shown("shards", number(made.shards)))
    print(shown("minutes of a shard", number(made.shard_seconds / 60)))
    print(shown("hours of the run", number(made.seconds / 3600)))
    print(shown("worker hours", number(made.worker_seconds / 3600)))
    print(shown("of these not computing", f"{made.lost:.1%}"))
    print(shown("failures of workers", number(made.failures)))
    print(shown("shards left to a second run", number(made.given_up)))
    if given.price_per_hour is not None:
        print(shown("cost", number(made.worker_seconds / 3600 * given.price_per_hour)))
        print(shown("cost of a million documents", f"{made.worker_seconds / 3600 * given.price_per_hour / given.documents * 1e6:.3g}"))


if __name__ == "__main__":
    main()
