#!/usr/bin/env python3
"""Checks the engine wrappers of a model folder against their graphs: one EPContext node each, the same inputs and outputs, an
engine path within the folder, and that ONNX Runtime accepts the file up to the missing provider.
"""

import json
import sys
from pathlib import Path

import onnx
import onnxruntime


def ports(values):
    return [(v.name, v.type.tensor_type.elem_type, str(v.type.tensor_type.shape)) for v in values]


def main():
    folder = Path(sys.argv[1])
    wrappers = sorted(folder.glob("*_ctx.onnx"))
    graphs = json.loads((folder / "manifest.json").read_text())["graphs"].values()
    assert [path.name for path in wrappers] == sorted(g["file"].replace(".onnx", "_ctx.onnx") for g in graphs), wrappers
    for path in wrappers:
        wrapper = onnx.load(path).graph
        graph = onnx.load(folder / path.name.replace("_ctx", ""), load_external_data=False).graph
        assert ports(wrapper.input) == ports(graph.input) and ports(wrapper.output) == ports(graph.output), path
        (node,) = wrapper.node
        assert (node.domain, node.op_type) == ("com.microsoft", "EPContext"), node
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["ep_cache_context"].decode() == f"engines/{path.stem.removesuffix('_ctx')}.plan", attributes
        assert attributes["embed_mode"] == 0 and attributes["main_context"] == 1
        try:
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:
            # The node is known and well-formed; only its provider is missing.
            assert "EPContext" in str(error) and "INVALID_GRAPH" not in str(error), error
        else:
            raise AssertionError(f"{path}: ran without TensorRT")


main()
