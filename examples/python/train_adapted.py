#!/usr/bin/env python3
"""Trains a checkpoint of `t5gemma-export adapt` on pairs of source and target, with PyTorch and transformers.

PAIRS is a file of JSON lines such as {"source": "translate: Good morning", "target": "Guten Morgen"}. Lists of token ids are taken as they
are. Start from here for your own data: a real run also needs a learning rate schedule, several GPUs and an evaluation."""

import argparse
import json
import pathlib
import random
import shutil

import torch
from transformers import AutoTokenizer, T5GemmaForConditionalGeneration

TOKENIZER = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]


def train(model, batches, steps, cross_attention_steps, learning_rate):
    """Yields the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step, batch in zip(range(steps), batches):
        # Random cross-attention must not disturb what the rest knows already.
        for name, weight in model.named_parameters():
            weight.requires_grad_(step >= cross_attention_steps or "cross_attn" in name)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def make_batches(pairs, size, pad, device):
    """Batches of pairs of token ids, drawn forever."""

    def padded(rows, value):
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    while True:
        sources, targets = zip(*random.sample(pairs, min(size, len(pairs))))
        mask = padded([[1] * len(row) for row in sources], 0)
        # The model makes the decoder's inputs of the labels; -100 is not counted.
        yield dict(input_ids=padded(sources, pad), attention_mask=mask, labels=padded(targets, -100))


def read_pairs(path, checkpoint, end, longest):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = None if all(isinstance(text, list) for line in lines for text in line.values()) else AutoTokenizer.from_pretrained(checkpoint)

    def ids(text, is_target):
        if isinstance(text, list):
            return text
        # The decoder's first token, which begins every text of Gemma's, is the model's own.
        return tokenizer(text, add_special_tokens=not is_target).input_ids

    return [(ids(line["source"], False)[:longest], ids(line["target"], True)[: longest - 1] + [end]) for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("pairs", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--cross-attention-steps", type=int, default=1000, help="first steps, in which only cross-attention is trained")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = T5GemmaForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype), attn_implementation="eager")
    model.to(device).train()
    ends = model.generation_config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    pairs = read_pairs(arguments.pairs, arguments.checkpoint, end, arguments.max_length)
    batches = make_batches(pairs, arguments.batch_size, model.generation_config.pad_token_id, device)
    losses = train(model, batches, arguments.steps, arguments.cross_attention_steps, arguments.learning_rate)
    for step, loss in enumerate(losses, 1):
        if step % 100 == 0 or step == arguments.steps:
            print(f"step {step}: loss {loss:.4f}", flush=True)
    model.save_pretrained(arguments.out)
    for name in TOKENIZER:
        if (arguments.checkpoint / name).exists():
            shutil.copy(arguments.checkpoint / name, arguments.out)


if __name__ == "__main__":
    main()
