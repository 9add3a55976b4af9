#!/usr/bin/env python3
"""Holds the wrappers of a model folder to the graphs they stand for: one EPContext node each, the same ports, an engine's
path below the folder, and an ONNX Runtime that reads the file as far as it goes without the provider it is for.
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
            # The node is known and well-formed; only nobody here can run it.
            assert "EPContext" in str(error) and "INVALID_GRAPH" not in str(error), error
        else:
            raise AssertionError(f"{path}: ran without TensorRT")


main()
