#!/usr/bin/env python3
"""Checks the fp8 weights of an exported model against its checkpoint: `check_float8.py MODEL CHECKPOINT`.

Every matrix must consist of the codes of `ml_dtypes` for its numbers divided by the scale, the smallest power of two with
which the largest number fits. Prints the number of matrices and of their elements.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy

TYPES = {"F32": numpy.float32, "F16": numpy.float16, "BF16": ml_dtypes.bfloat16}
STORED = {"float32": numpy.float32, "float16": numpy.float16, "bfloat16": ml_dtypes.bfloat16}


def checkpoint(folder):
    """The tensors of all safetensors files, in float32."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = (start + offset for offset in tensor["data_offsets"])
                numbers = numpy.frombuffer(data[first:last], TYPES[tensor["dtype"]])
                tensors[name] = numbers.reshape(tensor["shape"]).astype(numpy.float32)
    return tensors


def main():
    model, folder = map(Path, sys.argv[1:])
    weights = json.loads((model / "manifest.json").read_text())["weights"]
    data = (model / weights["file"]).read_bytes()
    held = {tensor["name"]: tensor for tensor in weights["tensors"]}
    whole = checkpoint(folder)
    matrices = numbers = 0
    for name, tensor in held.items():
        if tensor["dtype"] != "float8e4m3fn":
            continue
        name = name.removesuffix(".fp8")
        scales = held[f"{name}.scales"]
        assert scales["shape"] == [] and tensor["shape"] == list(whole[name].shape), name
        piece = lambda tensor: data[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
        scale = float(numpy.frombuffer(piece(scales), STORED[scales["dtype"]])[0])
        largest = float(numpy.abs(whole[name]).max())
        expected = max(2.0 ** numpy.ceil(numpy.log2(largest / 448)), 2.0**-14)
        assert scale == expected, f"{name}: a scale of {scale}, expected {expected}"
        codes = (whole[name] / numpy.float32(scale)).astype(ml_dtypes.float8_e4m3fn).view(numpy.uint8)
        found = numpy.frombuffer(piece(tensor), numpy.uint8).reshape(codes.shape)
        assert (found == codes).all(), f"{name}: {(found != codes).sum()} numbers of {codes.size} differ"
        matrices, numbers = matrices + 1, numbers + codes.size
    print(json.dumps({"matrices": matrices, "numbers": numbers}))


main()
