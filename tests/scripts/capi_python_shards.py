"""How the Python package runs `t5gemma batch` for a shard, without Ray: capi_python_shards.py DEMO CLASSIFIER. The program is a
script; ray_shards.py runs the real one."""

import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import time

from capi_python import fails
from t5gemma import _shards
from t5gemma._shards import ArgumentsRefused, ProgramKilled, ProgramNotFound, Shard

SCRIPT = """#!/bin/sh
case "$4" in *silent*) exit 3 ;; esac
echo "asked: $*" >&2
case "$4" in
*good*) echo '{"written": 1, "skipped": 0, "rows": 3}' ;;
*bad*) exit 1 ;;
*refused*) exit 2 ;;
*ended*) exit 130 ;;
*killed*) kill -9 $$ ;;
*endless*) echo $$ > "$4.pid"; exec sleep 600 ;;
esac
"""


def compute(program, name, arguments=("model", "--threads", "1")):
    return _shards.compute(program, list(arguments), Shard(name, f"/out/{os.path.basename(name)}", False))


def ends(program, folder):
    done = compute(program, "/in/good [1].jsonl")
    assert done.is_done and done.counts["rows"] == 3 and done.node and done.seconds > 0, done
    assert done.message == "asked: batch model --input /in/good [1].jsonl --output /out --threads 1", done
    failed = compute(program, "/in/bad.jsonl")
    assert not failed.is_done and "asked:" in failed.message, failed
    assert compute(program, "/in/silent.jsonl").message == f"{program} batch ended with exit status 3"
    fails(ArgumentsRefused, "asked:", lambda: compute(program, "/in/refused.jsonl"))
    fails(ProgramKilled, "ended by SIGKILL", lambda: compute(program, "/in/killed.jsonl"))
    fails(ProgramKilled, "ended by a request to end", lambda: compute(program, "/in/ended.jsonl"))

    # The program of a worker that is killed ends, too.
    written = pathlib.Path(folder, "endless.jsonl.pid")
    worker = multiprocessing.get_context("spawn").Process(target=compute, args=(program, str(written.with_suffix(""))))
    worker.start()
    until = time.monotonic() + 60
    while not (written.exists() and written.read_text().strip()):
        assert time.monotonic() < until
        time.sleep(0.01)
    child = int(written.read_text())
    os.kill(child, 0)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    while pathlib.Path(f"/proc/{child}/stat").exists() and " Z " not in pathlib.Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < until, "the program goes on"
        time.sleep(0.01)


def program_is_found(program, folder):
    for name in ("PATH", _shards.VARIABLE):
        os.environ.pop(name, None)
    fails(ProgramNotFound, "found none in PATH", lambda: compute(None, "/in/good.jsonl"))
    fails(ProgramNotFound, f"found none at {folder}/none", lambda: compute(f"{folder}/none", "/in/good.jsonl"))
    os.environ[_shards.VARIABLE] = f"{folder}/other"
    fails(ProgramNotFound, f"found none at {folder}/other", lambda: compute(None, "/in/good.jsonl"))
    assert compute(program, "/in/good.jsonl").is_done, "an argument goes first"
    os.environ[_shards.VARIABLE] = program
    assert compute(None, "/in/good.jsonl").is_done
    del os.environ[_shards.VARIABLE]
    os.environ["PATH"] = os.path.dirname(program)
    assert compute(None, "/in/good.jsonl").is_done


def inputs(folder):
    for name in ("b.jsonl", "a.jsonl", "c.parquet"):
        pathlib.Path(folder, name).touch()
    found = _shards.shards(f"{folder}/*.jsonl", "/out")
    assert [shard.output for shard in found] == ["/out/a.jsonl", "/out/b.jsonl"] and not found[0].is_done
    assert found[0].input == f"{folder}/a.jsonl"
    there = _shards.shards([pathlib.Path("x.jsonl"), "s3://bucket/y.jsonl"], "s3://bucket/out")
    assert [shard.input for shard in there] == [os.path.abspath("x.jsonl"), "s3://bucket/y.jsonl"]
    assert there[1].output == "s3://bucket/out/y.jsonl"
    fails(ValueError, "found none that match", lambda: _shards.shards(f"{folder}/*.gz", "/out"))
    fails(ValueError, "at least one file", lambda: _shards.shards([], "/out"))
    fails(ValueError, "different names", lambda: _shards.shards(["a/x", "b/x"], "/out"))
    fails(TypeError, "inputs[0]", lambda: _shards.shards([1], "/out"))
    assert _shards.threads(3.5, []) == ["--threads", "3"] and _shards.threads(0.5, []) == ["--threads", "1"]
    assert _shards.threads(4, ["--threads", "2"]) == _shards.threads(4, ["--threads=2"]) == []
    report = _shards.Report([Shard("a", "b", True), Shard("c", "d", False, "why")])
    assert str(report) == "1 of 2 shards are done\nc: why" and len(report.done) == len(report.failed) == 1


def main():
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "t5gemma")
        pathlib.Path(program).write_text(SCRIPT)
        os.chmod(program, 0o755)
        inputs(folder)
        ends(program, folder)
        program_is_found(program, folder)
    print("well")


if __name__ == "__main__":
    main()
