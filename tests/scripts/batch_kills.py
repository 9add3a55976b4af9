"""Kills `t5gemma batch` at random moments and starts it again, until all outputs are there: they must be those of a run that nothing
disturbed, byte for byte, and no file more.

    batch_kills.py T5GEMMA MODEL DOCUMENTS.parquet KILLS [SEED]

The shards have JSON lines, plain and compressed, Parquet, rows with errors and an empty shard. Between two kills, one in four runs has a
rival on the same folder. The options that must not change bytes (threads, windows, rows in flight) change from run to run.
"""

import gzip
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SHARDS, ROWS = 6, 12


def texts(shard, count):
    chance = random.Random(shard)
    words = "Dr. Smith paid $3.50 for 12 books on May 3, 1990 in Rome and Mt. Bell sold 7 kg".split()
    return [" ".join(chance.choices(words, k=chance.randint(1, 14))) for _ in range(count)]


def make_inputs(folder, documents):
    for shard in range(SHARDS):
        rows = [json.dumps({"id": f"{shard}-{row}", "body": text, "n": row}) for row, text in enumerate(texts(shard, ROWS))]
        rows[3] = '{"id": 3, "body": 5}'
        rows[7] = "no object"
        text = "".join(row + "\n" for row in rows)
        if shard % 2:
            (folder / f"s{shard}.jsonl").write_text(text)
        else:
            with gzip.GzipFile(folder / f"s{shard}.jsonl.gz", "wb", mtime=0) as file:
                file.write(text.encode())
    (folder / "empty.jsonl").write_text("")
    shutil.copy(documents, folder / "documents.parquet")


def command(program, model, inputs, output, chance=None):
    options = []
    if chance:
        options = ["--threads", str(chance.randint(1, 2)), "--window", str(chance.choice([1, 128, 4096])), "--max-rows", str(chance.choice([1, 5, 64]))]
    words = ["--input", f"{inputs}/*", "--output", str(output), "--text-column", "body", "--max-new-tokens", "24", "--details"]
    return [program, "batch", model, *words, *options]


def start(words):
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outputs(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def main():
    program, model, documents, kills = *sys.argv[1:4], int(sys.argv[4])
    seed = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        inputs = scratch / "in"
        inputs.mkdir()
        make_inputs(inputs, documents)
        begin = time.monotonic()
        process = start(command(program, model, inputs, scratch / "whole"))
        out, err = process.communicate()
        assert process.returncode == 0, err
        seconds = time.monotonic() - begin
        expected = outputs(scratch / "whole")
        assert len(expected) == SHARDS + 2, sorted(expected)
        done = rounds = finished = 0
        while done < kills:
            rounds += 1
            output = scratch / f"killed-{rounds}"
            for _ in range(1000):
                processes = [start(command(program, model, inputs, output, chance))]
                if chance.random() < 0.25:
                    processes.append(start(command(program, model, inputs, output, chance)))
                # A kill may come before anything is written, or never.
                deadline = time.monotonic() + chance.uniform(0.0, 1.2) * seconds * len(processes)
                victims = [process for process in processes if chance.random() < 0.9]
                while time.monotonic() < deadline and any(process.poll() is None for process in victims):
                    time.sleep(0.005)
                for process in victims:
                    if process.poll() is None:
                        process.send_signal(signal.SIGKILL)
                        done += 1
                status = []
                for process in processes:
                    _, err = process.communicate()
                    assert process.returncode in (0, -signal.SIGKILL), (process.returncode, err)
                    status.append(process.returncode)
                # What has its name is complete, at every moment.
                found = outputs(output) if output.exists() else {}
                assert found.items() <= expected.items(), f"kill {done}: outputs differ: {sorted(found.items() - expected.items())}"
                if 0 in status:
                    break
            process = start(command(program, model, inputs, output))
            out, err = process.communicate()
            assert process.returncode == 0, err
            assert json.loads(out)["written"] == 0, f"a run was complete, and another wrote more: {out}"
            assert outputs(output) == expected, f"after {done} kills, outputs differ"
            left = [path.name for path in (output / "_batch").iterdir() if path.name.endswith(".tmp")]
            whole = json.loads((output / "_batch/s1.jsonl.json").read_text())
            assert whole["sha256"] == expected["s1.jsonl"] and whole["rows"] == ROWS and whole["errors"] == 2, whole
            assert not left, f"left behind: {left}"
            finished += 1
    print(f"{done} kills in {finished} runs that were started again until they were complete: the same {len(expected)} outputs, byte for byte")


if __name__ == "__main__":
    main()
