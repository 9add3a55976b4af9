#!/usr/bin/env python3
"""Holds the graphs of model folders to the ONNX standard with the `onnx` package's own checker and strict shape
inference, and to what this project promises of every target but the CPU's: standard operators up to opset 21, no
control flow, nothing unused. `check_onnx.py MODEL...` prints a line a graph and exits with 1 if one is at fault.
"""

import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx

GRAPHS = ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"]
OPSET, IR_VERSION = 21, 10


def faults(path, places):
    """Yields what is wrong with a graph. `places` holds where every graph's initializers lie in the weights file."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    if set(opsets) != {""} or opsets[""] > OPSET:
        yield f"operator sets {opsets}, expected the default domain up to {OPSET}"
    if model.ir_version > IR_VERSION:
        yield f"ir_version {model.ir_version}, expected up to {IR_VERSION}"
    if model.functions:
        yield f"{len(model.functions)} local functions, expected none"
    for node in graph.node:
        if node.domain:
            yield f"node {node.name}: operator {node.domain}.{node.op_type}"
        if any(attribute.type in (attribute.GRAPH, attribute.GRAPHS) for attribute in node.attribute):
            yield f"node {node.name}: {node.op_type} holds a graph"
    for name, count in Counter(node.name for node in graph.node).items():
        if not name or count > 1:
            yield f"{count} nodes named {name!r}"

    used = {name for node in graph.node for name in node.input} | {port.name for port in graph.output}
    made = [name for node in graph.node for name in node.output]
    given = [value.name for value in [*graph.input, *graph.initializer]]
    for name in made + given:
        if name and name not in used:
            yield f"value {name} is not used"
    for tensor in graph.initializer:
        yield from misplaced(tensor, path.parent, places)

    try:
        onnx.checker.check_model(str(path), full_check=True)
        with tempfile.TemporaryDirectory() as folder:
            inferred = Path(folder, path.name)
            onnx.shape_inference.infer_shapes_path(path, inferred, check_type=True, strict_mode=True, data_prop=True)
            inferred = onnx.load(inferred, load_external_data=False).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield str(error).strip()
        return
    ranked = {
        value.name
        for value in [*inferred.value_info, *inferred.output]
        if value.type.tensor_type.elem_type and value.type.tensor_type.HasField("shape")
    }
    for name in made:
        if name and name not in ranked:
            yield f"value {name}: shape inference finds no rank"


def misplaced(tensor, folder, places):
    """Yields what is wrong with an initializer's entry of the weights file, if it has one."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entry = {item.key: item.value for item in tensor.external_data}
    file, offset, length = folder / entry["location"], int(entry.get("offset", 0)), int(entry.get("length", -1))
    size = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if tensor.data_type == onnx.TensorProto.INT4:
        size = (size + 1) // 2
    if file.parent != folder or not file.is_file():
        yield f"initializer {tensor.name}: no file {entry['location']} beside the graph"
    elif length != size:
        yield f"initializer {tensor.name}: {length} bytes, expected {size}"
    elif offset + length > file.stat().st_size:
        yield f"initializer {tensor.name}: ends at {offset + length} of {file.stat().st_size} bytes"
    place = (entry["location"], offset, length)
    if places.setdefault(tensor.name, place) != place:
        yield f"initializer {tensor.name}: at {place}, in another graph at {places[tensor.name]}"


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    failed = False
    for model in map(Path, sys.argv[1:]):
        places = {}
        for path in (model / name for name in GRAPHS):
            found = list(faults(path, places))
            graph = onnx.load(path, load_external_data=False).graph
            failed |= bool(found)
            print(f"{'FAIL' if found else 'ok'} {path}: {len(graph.node)} nodes, {len(graph.initializer)} initializers")
            for fault in found:
                print(f"     {fault}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
