#!/usr/bin/env python3
"""Makes a Gemma 2 checkpoint of real size with meaningless weights in bfloat16, to time `t5gemma-export adapt`:

    dummy_gemma2.py 2b|9b FOLDER [LAYERS]

The numbers are a block of random ones, over and over. There is no tokenizer."""

import json
import math
import random
import struct
import sys
from pathlib import Path

SIZES = {
    "2b": dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4),
    "9b": dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8),
}
HEAD_DIM, VOCAB = 256, 256000
SHARD = 5_000_000_000


def shapes(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads):
    yield "model.embed_tokens.weight", [VOCAB, hidden_size]
    yield "model.norm.weight", [hidden_size]
    queries, keys = num_attention_heads * HEAD_DIM, num_key_value_heads * HEAD_DIM
    for layer in range(num_hidden_layers):
        at = f"model.layers.{layer}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{at}{norm}_layernorm.weight", [hidden_size]
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}self_attn.{name}_proj.weight", [rows, hidden_size]
        yield f"{at}self_attn.o_proj.weight", [hidden_size, queries]
        yield f"{at}mlp.gate_proj.weight", [intermediate_size, hidden_size]
        yield f"{at}mlp.up_proj.weight", [intermediate_size, hidden_size]
        yield f"{at}mlp.down_proj.weight", [hidden_size, intermediate_size]


def write(path, tensors, block):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while end > 0:
            file.write(block[:end])
            end -= len(block)


def main(size, folder, layers=None):
    config = SIZES[size] | (dict(num_hidden_layers=int(layers)) if layers else {})
    folder = Path(folder)
    folder.mkdir()
    told = config | dict(model_type="gemma2", head_dim=HEAD_DIM, vocab_size=VOCAB, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(told | dict(architectures=["Gemma2ForCausalLM"], hidden_activation="gelu_pytorch_tanh")))
    # The upper bytes of numbers around 0.02.
    random.seed(0)
    block = b"".join(bytes((random.getrandbits(8), random.choice((0x3B, 0x3C, 0xBB, 0xBC)))) for _ in range(1 << 20))
    shards, size = [[]], 0
    for name, shape in shapes(**config):
        bytes_of = 2 * math.prod(shape)
        if shards[-1] and size + bytes_of > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += bytes_of
    names = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write(folder / name, tensors, block)
    index = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main(*sys.argv[1:])
