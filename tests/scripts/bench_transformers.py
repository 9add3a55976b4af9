#!/usr/bin/env python3
"""Times a decoder step of transformers' own T5Gemma with random bfloat16 weights of one of Google's sizes, to compare with
`t5gemma bench` on the same GPU: `bench_transformers.py SIZE [--batch N...] [--device N]`. Prints a JSON line for each batch.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

PRESETS = Path(__file__).resolve().parents[2] / "exporter/presets"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("size")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    arguments.add_argument("--source-length", type=int, default=512)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--device", type=int, default=0)
    given = arguments.parse_args()
    config = T5GemmaConfig(**json.loads((PRESETS / f"{given.size}.json").read_text()))
    config._attn_implementation = "eager"
    device = torch.device("cuda", given.device)
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = T5GemmaForConditionalGeneration(config).eval()
    for batch in given.batch:
        sources = torch.randint(3, 1000, (batch, given.source_length), device=device)

        def seconds(tokens):
            torch.cuda.synchronize()
            start = time.monotonic()
            model.generate(sources, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
            torch.cuda.synchronize()
            return time.monotonic() - start

        seconds(4)
        one = min(seconds(1) for _ in range(3))
        all_tokens = min(seconds(given.tokens) for _ in range(3))
        step = (all_tokens - one) / (given.tokens - 1)
        report = {"size": given.size, "batch": batch, "first_token_ms": one * 1e3, "step_ms": step * 1e3}
        print(json.dumps({**report, "tokens_per_second": batch / step, "torch": torch.__version__}), flush=True)


main()
