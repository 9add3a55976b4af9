"""t5gemma.ray.run_shards: ray_shards.py PROGRAM MODEL EVAL EXACT. A worker and a program are killed on the way, and of the demo's
sentences, EXACT have to come out as expected, each once."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time

import ray_local

SHARDS = 10
ARGUMENTS = ["--max-new-tokens", "96"]


def processes(word):
    """Process id and parent of the programs with this word in their command line."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().split(b"\0")
                if b"batch" in command and any(word.encode() in part for part in command):
                    found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def wait_for(what, condition, seconds=60):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"{seconds} seconds, and not {what}"
        time.sleep(0.01)
    return found


def kill(folder, done):
    """Kills a worker in the middle of a shard, and later a program."""
    program, worker = next(iter(wait_for("a program", lambda: processes(folder)).items()))
    os.kill(worker, signal.SIGKILL)
    wait_for("the program of the killed worker has ended", lambda: program not in processes(folder))
    wait_for("some shards are done", lambda: len(done) >= 3)
    program = wait_for("another program", lambda: [one for one in processes(folder) if one != program])[0]
    os.kill(program, signal.SIGKILL)
    killed.append((worker, program))


def fails(kind, part, work):
    try:
        work()
    except kind as error:
        assert part in str(error), f"expected {part!r} in {error!r}"
        return error
    raise AssertionError(f"expected {kind.__name__} with {part!r}")


killed = []


def main(program, model, lines, exact):
    ray_local.leave_the_network()
    with open(lines, encoding="utf-8") as file:
        sentences = [json.loads(line) for line in file]
    with tempfile.TemporaryDirectory() as folder, ray_local.cluster(2):
        import t5gemma.ray

        sources, results = pathlib.Path(folder, "in"), pathlib.Path(folder, "out")
        sources.mkdir()
        for shard in range(SHARDS):
            rows = [{"id": at, "text": sentences[at]["text"]} for at in range(shard, len(sentences), SHARDS)]
            (sources / f"part-{shard:05}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def run(inputs=f"{sources}/*.jsonl", **given):
            return t5gemma.ray.run_shards(inputs, results, **{"model": model, "program": program, "arguments": ARGUMENTS, **given})

        done = []
        killer = threading.Thread(target=kill, args=(str(results), done))
        killer.start()
        report = run(on_shard=done.append)
        killer.join()
        assert killed and len(report.done) == len(done) == SHARDS and not report.failed, report
        outputs = sorted(results.glob("*.jsonl"))
        assert [str(output) for output in outputs] == [shard.output for shard in report.shards]
        rows = [json.loads(line) for output in outputs for line in output.read_text().splitlines()]
        assert sorted(row["id"] for row in rows) == list(range(len(sentences))), "each row once"
        found = sum(row["generated_text"] == sentences[row["id"]]["target"] for row in rows)
        assert found == int(exact), found
        print(f"{len(rows)} rows, each once, {found} as expected, with a worker and a program killed")

        # Again: what is missing is computed, and nothing else.
        times = {output: output.stat().st_mtime_ns for output in outputs}
        outputs[4].unlink()
        again = run(concurrency=1)
        assert len(again.done) == SHARDS and sum(shard.counts["skipped"] for shard in again.done) == SHARDS - 1, again
        changed = [output for output in outputs if output.stat().st_mtime_ns != times[output]]
        assert changed == outputs[4:5], changed

        # An exception of the caller's, such as that of Ctrl-C, ends all programs.
        for output in outputs:
            output.unlink()
        fails(ZeroDivisionError, "", lambda: run(on_shard=lambda shard: 1 / 0))
        wait_for("the programs have ended", lambda: not processes(str(results)))
        assert len(list(results.glob("*.jsonl"))) < SHARDS

        # A shard that cannot be done does not disturb the others.
        report = run([sources / "part-00005.jsonl", sources / "missing.jsonl"])
        assert [shard.is_done for shard in report.shards] == [True, False] and "missing.jsonl" in report.failed[0].message, report
        assert "1 of 2 shards are done" in str(report)

        fails(t5gemma.ray.ProgramNotFound, "found none at /no/such/program", lambda: run(program="/no/such/program"))
        fails(t5gemma.ray.ArgumentsRefused, "--no-such-flag", lambda: run(arguments=["--no-such-flag"]))
        fails(ValueError, "found none that match", lambda: run(f"{sources}/*.parquet"))
        fails(ValueError, "at least one file", lambda: run([]))
        fails(ValueError, "different names", lambda: run([sources / "a.jsonl", results / "a.jsonl"]))
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
