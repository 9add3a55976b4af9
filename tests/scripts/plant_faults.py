#!/usr/bin/env python3
"""Plants faults in a graph: `plant_faults.py GRAPH.onnx FOLDER` writes FOLDER/FAULT/GRAPH.onnx for each fault, with links to the
weights, and prints a JSON list of [fault, kind of the expected finding, node that it must name].
"""

import json
import os
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper


def first(graph, op):
    return next(node for node in graph.node if node.op_type == op)


def same_name_in_another_domain(graph):
    node = first(graph, "Gelu")
    node.domain = "com.microsoft"
    return "domain", node.name


def operator_of_another_domain(graph):
    node = first(graph, "Gelu")
    node.domain, node.op_type = "com.microsoft", "FastGelu"
    del node.attribute[:]
    return "operator", node.name


def operator_that_is_not_imported(graph):
    node = first(graph, "Tanh")
    node.op_type = "Det"
    return "operator", node.name


def operator_of_a_later_version(graph):
    node = first(graph, "Gelu")
    node.op_type = "Swish"
    del node.attribute[:]
    return "version", node.name


def attention_with_a_soft_cap(graph):
    node = first(graph, "Gelu")
    node.op_type = "Attention"
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("softcap", 50.0))
    return "rule", node.name


def double(graph):
    name = next(node.input[1] for node in graph.node if node.op_type == "Mul")
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(helper.make_tensor(name, TensorProto.DOUBLE, [], [1.0]))
    return "type", name


def cast_left_out(graph):
    cast = next(node for node in graph.node if node.op_type == "Cast" and "layernorm" in node.name)
    users = [node for node in graph.node if cast.output[0] in node.input]
    for node in users:
        node.input[:] = [cast.input[0] if name == cast.output[0] else name for name in node.input]
    graph.node.remove(cast)
    return "strong-typing", None


def declared_otherwise(graph):
    node = first(graph, "Tanh")
    info = next(info for info in graph.value_info if info.name == node.output[0])
    info.type.tensor_type.elem_type = TensorProto.FLOAT16
    return "strong-typing", node.name


def axes_that_are_an_input(graph):
    node = first(graph, "ReduceMean")
    graph.input.append(helper.make_tensor_value_info("axes", TensorProto.INT64, [1]))
    node.input[1] = "axes"
    return "rule", node.name


def too_many_candidates(graph):
    node = first(graph, "TopK")
    graph.initializer.append(helper.make_tensor("many", TensorProto.INT64, [1], [4000]))
    node.input[1] = "many"
    return "rule", node.name


def tensor_without_elements(graph):
    graph.initializer.append(helper.make_tensor("nothing", TensorProto.FLOAT, [0], []))
    return "empty", "nothing"


def external(change):
    def plant(graph):
        tensor = next(tensor for tensor in graph.initializer if tensor.external_data)
        change({entry.key: entry for entry in tensor.external_data})
        return "external-data", tensor.name

    return plant


def setting(key, value):
    def change(entries):
        entries[key].value = value(entries[key].value)

    return external(change)


FAULTS = {
    "same_name_in_another_domain": same_name_in_another_domain,
    "operator_of_another_domain": operator_of_another_domain,
    "operator_that_is_not_imported": operator_that_is_not_imported,
    "operator_of_a_later_version": operator_of_a_later_version,
    "attention_with_a_soft_cap": attention_with_a_soft_cap,
    "double": double,
    "cast_left_out": cast_left_out,
    "declared_otherwise": declared_otherwise,
    "axes_that_are_an_input": axes_that_are_an_input,
    "too_many_candidates": too_many_candidates,
    "tensor_without_elements": tensor_without_elements,
    "weights_above_the_folder": setting("location", lambda name: "../" + name),
    "weights_that_are_not_there": setting("location", lambda name: "other_" + name),
    "weights_cut_short": setting("length", lambda length: str(int(length) - 2)),
    "weights_beyond_the_end": setting("offset", lambda _: str(1 << 40)),
}


def main():
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    expected = []
    for name, plant in FAULTS.items():
        folder = out / name
        folder.mkdir()
        model = onnx.load(source, load_external_data=False)
        kind, place = plant(model.graph)
        onnx.save(model, folder / source.name)
        for weights in source.parent.glob("*.onnx_data"):
            os.symlink(weights, folder / weights.name)
        expected.append([name, kind, place])
    print(json.dumps(expected))


main()
