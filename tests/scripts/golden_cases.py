#!/usr/bin/env python3
"""Runs a fixture's generation cases by the program and compares the tokens with the reference's:
`golden_cases.py T5GEMMA MODEL FIXTURE --dtype TYPE [--tokens FILE] [-- option of t5gemma generate ...]`, with the tokens
written into a file to be compared with another run's.

In float32 every token has to be the same. In half precision tokens may rightly differ: how many cases agree is told, and what
fails is an error of the program only.
"""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    program, model, fixture, _, dtype, *written = sys.argv[1:split]
    fixture = Path(fixture)
    tensors = load_file(fixture / "golden.safetensors")
    cases = json.loads((fixture / "cases.json").read_text())["cases"]
    requests = []
    for case in cases:
        request = {"id": case["id"], "options": case["options"]}
        for part in ("input_ids", "attention_mask"):
            request[part] = tensors[f"in.{case['input']}.{part}"].tolist()
        if case["decoder_input_ids"] is not None:
            request["decoder_input_ids"] = case["decoder_input_ids"]
        requests.append(json.dumps(request))
    command = [program, "generate", model, "--jsonl", *sys.argv[split + 1 :]]
    ran = subprocess.run(command, input="\n".join(requests) + "\n", capture_output=True, text=True)
    sys.stderr.write(ran.stderr)
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    if len(results) != len(cases):
        sys.exit(f"{len(results)} results for {len(cases)} cases")
    errors, different, tokens = [], [], []
    for case, result in zip(cases, results):
        sequences = [[sequence["tokens"] for sequence in row] for row in result.get("sequences", [])]
        tokens.append(f"{case['id']} {json.dumps(sequences)}\n")
        if "error" in result:
            errors.append(f"{case['id']}: {result['error']}")
            continue
        found = [sequence["tokens"] for row in result["sequences"] for sequence in row]
        if found != case["expected"]["tokens"]:
            different.append(case["id"])
    if written:
        Path(written[1]).write_text("".join(tokens))
    print(f"{len(cases) - len(errors) - len(different)} of {len(cases)} cases give the reference's tokens")
    for line in errors:
        print("error:", line)
    if different:
        print("different:", *different)
    sys.exit(bool(errors or (different and dtype == "float32")))


main()
