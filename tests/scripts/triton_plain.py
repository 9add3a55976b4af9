#!/usr/bin/env python3
"""Runs the model that `t5gemma-export --triton-backend onnxruntime` (or tensorrt) writes for Triton's `python` backend without Triton:
its requests to the graphs' models go to Python's onnxruntime. `triton_plain.py REPOSITORY NAME BACKEND` compares it with the reference's
greedy tokens."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

CASES = json.loads((Path(__file__).resolve().parents[1] / "demo/expected.json").read_text())
TYPES = {"tensor(float)": model_config_pb2.TYPE_FP32, "tensor(int64)": model_config_pb2.TYPE_INT64, "tensor(int32)": model_config_pb2.TYPE_INT32}
repository, name, backend = Path(sys.argv[1]), sys.argv[2], sys.argv[3]


def config_of(model):
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


class Tensor:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def as_numpy(self):
        return self.value


class Response:
    def __init__(self, output_tensors=(), error=None):
        self.tensors, self.failure = {tensor.name: tensor for tensor in output_tensors}, error

    def has_error(self):
        return self.failure is not None

    def error(self):
        return self.failure


class Request:
    """To one of the graphs' models."""

    sessions = {}

    def __init__(self, model_name, requested_output_names, inputs, preferred_memory):
        assert preferred_memory == "CPU"
        self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

    def exec(self):
        if self.model not in self.sessions:
            config = config_of(self.model)
            assert (config.name, config.backend) == (self.model, backend), config
            graph = repository / self.model / "1" / config.default_model_filename
            if backend == "tensorrt":
                # A link to the plan, which nobody has built; the graph that it is built of runs on CPUs too.
                assert list(config.instance_group[0].profile) == ["0"] and not graph.exists(), config
                plan = graph.parent / graph.readlink()
                graph = plan.parent.parent / f"{plan.stem}.onnx"
            session = self.sessions[self.model] = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            for listed, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
                ports = [(port.name, port.data_type, len(port.dims), [size for size in port.dims if size > 0]) for port in listed]
                sizes = [[size for size in port.shape if isinstance(size, int)] for port in found]
                assert ports == [(port.name, TYPES[port.type], len(port.shape), fixed) for port, fixed in zip(found, sizes)], ports
        values = self.sessions[self.model].run(self.wanted, {tensor.name: tensor.value for tensor in self.inputs})
        return Response([Tensor(*pair) for pair in zip(self.wanted, values, strict=True)])


class FromClient:
    def __init__(self, texts, **parameters):
        self.tensors = {"text_input": Tensor("text_input", np.array([text.encode() for text in texts], dtype=np.object_))}
        self.sent = json.dumps(parameters)

    def parameters(self):
        return self.sent


def tensor_of(owner, name):
    return owner.tensors[name]


sys.modules["triton_python_backend_utils"] = types.SimpleNamespace(
    PreferredMemory=lambda kind: kind, TRITONSERVER_MEMORY_CPU="CPU", Tensor=Tensor, InferenceRequest=Request, InferenceResponse=Response, TritonError=Exception, TritonModelException=Exception,
    get_input_tensor_by_name=tensor_of, get_output_tensor_by_name=tensor_of,
)
model = runpy.run_path(str(repository / name / "1/model.py"))["TritonPythonModel"]()
config = config_of(name)
assert config.backend == "python" and [port.name for port in config.output] == ["text_output"], config
model.initialize({"model_repository": str(repository / name), "model_config": json_format.MessageToJson(config, preserving_proto_field_name=True)})
for case in CASES[:5]:
    assert model.generate(case["input_ids"], 64) == case["greedy"], case
both, short, wrong = model.execute([FromClient([case["text"] for case in CASES[:2]]), FromClient(["Dr. Smith"], max_new_tokens=2), FromClient(["a"], max_new_tokens="x")])
texts = [text.decode() for text in tensor_of(both, "text_output").as_numpy()]
assert texts == [model.tokenizer.decode(case["greedy"], skip_special_tokens=True) for case in CASES[:2]], texts
assert len(tensor_of(short, "text_output").as_numpy()[0]) < 8 and wrong.has_error()
print("plain")
