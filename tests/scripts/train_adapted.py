#!/usr/bin/env python3
"""From tiny Gemma 2 checkpoints to answers: adapts those of tests/fixtures/adapt, trains them with examples/python/train_adapted.py until they
know some pairs by heart, exports them and checks that greedy search has the targets. `train_adapted.py T5GEMMA-EXPORT T5GEMMA SCRATCH`; Python
needs PyTorch and transformers."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/adapt"
EXAMPLE = ROOT / "examples/python/train_adapted.py"
# Pairs, steps, and the loss below which all pairs are known.
COUNT, STEPS, KNOWN = 8, 200, 0.1
# Name, fixture, options of adapt, and of training: what is random is trained alone first.
CASES = [
    ("balanced", "balanced", [], ["--cross-attention-steps", "0"]),
    ("closed", "balanced", ["--cross-norms", "closed"], ["--cross-attention-steps", "0"]),
    ("unbalanced", "unbalanced", ["--dtype", "float32"], ["--cross-attention-steps", "100"]),
    ("untied", "untied", [], ["--cross-attention-steps", "0"]),
]


def run(*command, **given):
    return subprocess.run([str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE, **given).stdout


def answers(program, model, pairs):
    """The greedy target of each source, without its last token."""
    request = {"input_ids": [pair["source"] for pair in pairs], "options": {"max_new_tokens": 12}}
    result = json.loads(run(program, "generate", model, "--jsonl", input=json.dumps(request)))
    return [row[0]["tokens"][:-1] for row in result["sequences"]]


def check(exporter, program, scratch, name, fixture, options, training):
    cases = json.loads((FIXTURES / fixture / "cases.json").read_text())
    sources = [FIXTURES / fixture / cases[side] for side in ("encoder", "decoder")]
    adapted, trained = scratch / f"{name}-adapted", scratch / f"{name}-trained"
    run(exporter, "adapt", *options, *sources, adapted)
    drawn = random.Random(1)
    ids = lambda: [drawn.randrange(3, 80) for _ in range(6)]
    pairs = [{"source": [2, *ids()], "target": ids()} for _ in range(COUNT)]
    (scratch / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    steps = ["--steps", STEPS, "--learning-rate", 3e-3, *training]
    # Threads only wait for each other in matrices of this size.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = run(sys.executable, EXAMPLE, adapted, scratch / "pairs.jsonl", trained, *steps, env=environment)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    known = {}
    for stage, checkpoint in (("adapted", adapted), ("trained", trained)):
        model = scratch / f"{name}-{stage}-model"
        run(exporter, "--quiet", checkpoint, model)
        known[stage] = sum(found == pair["target"] for found, pair in zip(answers(program, model, pairs), pairs, strict=True))
    print(f"{name}: losses {losses}, {known['adapted']} of {COUNT} targets before training, {known['trained']} after", flush=True)
    return losses[-1] < KNOWN and known == {"adapted": 0, "trained": COUNT}


def main(exporter, program, scratch):
    scratch = Path(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    wrong = [case[0] for case in CASES if not check(exporter, program, scratch, *case)]
    sys.exit(f"not learned: {', '.join(wrong)}" if wrong else None)


main(*sys.argv[1:])
