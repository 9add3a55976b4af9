"""examples/python/beam_generate.py on this machine, in this process's Python: beam_example.py MODEL EVAL EXACT. Of the demo's
sentences, EXACT have to come out as expected, each once."""

import json
import pathlib
import subprocess
import sys
import tempfile

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples/python/beam_generate.py"
RUNNERS = (["--runner=DirectRunner"], ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"])


def main(model, lines, exact):
    with open(lines, encoding="utf-8") as file:
        sentences = [json.loads(line) for line in file]
    for runner in RUNNERS:
        with tempfile.TemporaryDirectory() as folder:
            for shard in range(4):
                rows = [{"id": at, "text": sentences[at]["text"]} for at in range(shard, len(sentences), 4)]
                pathlib.Path(folder, f"in-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            command = [sys.executable, EXAMPLE, "--model", model, "--input", f"{folder}/in-*.jsonl", "--output", f"{folder}/out"]
            done = subprocess.run([*command, "--max_new_tokens", "96", *runner], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            outputs = sorted(pathlib.Path(folder).glob("out*.jsonl"))
            rows = [json.loads(line) for output in outputs for line in output.read_text().splitlines()]
            assert sorted(row["id"] for row in rows) == list(range(len(sentences))), "each row once"
            found = sum(row["output"] == sentences[row["id"]]["target"] for row in rows)
            assert found == int(exact), found
            print(f"{' '.join(runner)}: {len(rows)} rows, each once, {found} as expected")
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
