"""How triton_checks.py and triton_faults.py ask Triton Inference Server: tensors, refusals and streams."""

import json
import queue
from pathlib import Path

import numpy as np
from tritonclient.utils import InferenceServerException

from triton_server import PATIENCE

DEMO = Path(__file__).resolve().parents[1] / "demo"
CASES = json.loads((DEMO / "expected.json").read_text())
# Requests that do not end by themselves within a test.
ENDLESS = {"max_new_tokens": 480, "min_new_tokens": 480}
LONG = {"max_new_tokens": 200, "min_new_tokens": 200, "num_beams": 4}


def texts(client, *values, name="text_input", shape=None, **more):
    tensor = client.InferInput(name, shape or [len(values)], "BYTES")
    values = [value if isinstance(value, bytes) else value.encode() for value in values]
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_).reshape(shape or [-1]), **more)
    return tensor


def numbers(client, name, values, dtype=np.int64, datatype="INT64"):
    array = np.array(values, dtype=dtype)
    tensor = client.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def only(result, name="text_output"):
    (value,) = result.as_numpy(name).reshape(-1)
    return value.decode() if isinstance(value, bytes) else value


def refused(call, *words):
    """The message of an error, which has these words."""
    try:
        call()
    except InferenceServerException as error:
        assert all(word in f"{error.status()} {error.message()}" for word in words), (words, error.status(), error.message())
        return error.message()
    raise AssertionError(f"no error with {words}")


def refused_json(server, path, body, status, *words):
    found, answer = server.get(path, body)
    assert found == status and all(word in answer for word in words), (status, words, found, answer)


class Stream:
    """A gRPC stream of responses to one request."""

    def __init__(self, client, name, inputs, **more):
        self.client, self.events = client, queue.Queue()
        client.start_stream(lambda result, error: self.events.put((result, error)))
        client.async_stream_infer(name, inputs, enable_empty_final_response=True, **more)

    def next(self):
        result, error = self.events.get(timeout=PATIENCE)
        if error:
            raise error
        return result, result.get_response().parameters["triton_final_response"].bool_param

    def all(self):
        results = []
        while True:
            result, is_final = self.next()
            if is_final:
                self.client.stop_stream()
                assert not result.get_response().outputs, result
                return results
            results.append(result)


def events(server, name, body):
    """The JSON of server-sent events."""
    status, text = server.get(f"/v2/models/{name}/generate_stream", body)
    assert status == 200, text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


def listed(value):
    return value if isinstance(value, list) else [value]
