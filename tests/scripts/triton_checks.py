#!/usr/bin/env python3
"""Asks Triton Inference Server with the backend t5gemma as its users do: `triton_checks.py CHECK TRITON BACKENDS DEMO TASKS WORK`, with
the folders of the server, of the backends, of the demo model, and of the models of other tasks by name. Prints the check's name if all
answers are right."""

import asyncio
import collections
import concurrent.futures
import json
import queue
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as aio
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from triton_server import PATIENCE, Server, model, parameter

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


def repository(folder, demo, tasks):
    folder.mkdir()
    model(folder, "demo", demo)
    model(folder, "demo_stream", demo)
    model(folder, "batched", demo, "max_batch_size: 8\ndynamic_batching { }\n")
    model(folder, "beams", demo, parameter("options", '{"num_beams": 4}'))
    model(folder, "labels", tasks / "labels")
    model(folder, "tokens", tasks / "tokens")
    model(folder, "vectors", tasks / "vectors")
    model(folder, "states", demo, parameter("task", "feature-extraction"))
    # Without a configuration, and with the model folder as the version's.
    model(folder, "bare.t5gemma", config=False)
    (folder / "bare.t5gemma/1").rmdir()
    shutil.copytree(demo, folder / "bare.t5gemma/1")
    return folder


def check_metadata(server, client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("demo_stream")
    assert {found["state"] for found in client.get_model_repository_index()} == {"READY"}
    config = client.get_model_config("bare.t5gemma")
    assert [port["name"] for port in config["output"]][:3] == ["text_output", "output_ids", "finish_reason"], config
    assert all(port["optional"] for port in config["input"]), config
    assert [group["kind"] for group in config["instance_group"]] == ["KIND_MODEL"], config
    policies = {name: client.get_model_config(name).get("model_transaction_policy") for name in ("demo", "demo_stream")}
    assert policies == {"demo": None, "demo_stream": {"decoupled": True}}, policies
    assert "'demo_stream' shares what 'demo' has opened" in server.text() or "'demo' shares what" in server.text(), server.text()
    # One engine for the four models of the folder, one for the other folder.
    engines = [name for name in server.metrics() if name.startswith("t5gemma_steps_total")]
    assert len(engines) == 2, engines


def check_infer(server, web, rpc):
    case = CASES[0]
    text, greedy = case["text"], case["greedy"]
    expected = only(web.infer("demo", [texts(http, text)]))
    parameters = {"num_beams": 4, "length_penalty": 1.0, "do_sample": False, "early_stopping": "never"}
    for client, library in ((web, http), (rpc, grpc)):
        result = client.infer("demo", [texts(library, text)], request_id="7", parameters={"max_new_tokens": 64})
        response = result.get_response()
        assert (response["id"] if library is http else response.id) == "7", response
        assert (only(result), only(result, "finish_reason")) == (expected, "eos") and list(result.as_numpy("output_ids")[0]) == greedy
        assert result.as_numpy("scores") is None and result.as_numpy("result") is None, response
        result = client.infer("demo", [texts(library, text)], parameters=parameters)
        assert abs(only(result, "scores") - case["beam4_score"]) < 1e-4 and list(result.as_numpy("output_ids")[0]) == case["beam4"]
        # Rows of two lengths, with padding.
        other = CASES[1]
        ids = [case["input_ids"], other["input_ids"]]
        length = max(map(len, ids))
        rows = [numbers(library, "input_ids", [row + [0] * (length - len(row)) for row in ids])]
        rows.append(numbers(library, "attention_mask", [[1] * len(row) + [0] * (length - len(row)) for row in ids]))
        result = client.infer("demo", rows)
        targets = [other["greedy"], greedy]
        found = result.as_numpy("output_ids").tolist()
        assert found == [row + [0] * (len(found[0]) - len(row)) for row in reversed(targets)], found
    for binary in (True, False):
        outputs = [http.InferRequestedOutput("text_output", binary_data=binary)]
        result = web.infer("demo", [texts(http, text, binary_data=not binary)], outputs=outputs)
        found = result.as_numpy("text_output")[0]
        assert found in (expected, expected.encode()) and result.as_numpy("output_ids") is None
    packed = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}
    assert only(web.infer("demo", [texts(http, text)], **packed)) == expected
    assert only(rpc.infer("beams", [texts(grpc, text)])) == expected
    assert rpc.infer("beams", [texts(grpc, text)]).as_numpy("scores") is not None
    assert rpc.infer("beams", [texts(grpc, text)], parameters={"num_beams": 1}).as_numpy("scores") is None
    assert only(web.infer("bare.t5gemma", [texts(http, text)])) == expected

    # All that is written about a target.
    names = ["output_ids", "output_lengths", "logprobs", "sequence_logprobs", "top_ids", "top_logprobs", "cross_attentions", "result", "scores"]
    options = {"options": json.dumps({"num_return_sequences": 2, "num_beams": 3, "output_attentions": True}), "top_logprobs": 2, "output_logprobs": True}
    result = rpc.infer("demo", [texts(grpc, text, text)], parameters=options, outputs=list(map(grpc.InferRequestedOutput, names)))
    found = {name: result.as_numpy(name) for name in names}
    rows, targets, longest = found["output_ids"].shape
    assert (rows, targets) == (2, 2) and found["logprobs"].shape == found["output_ids"].shape and result.as_numpy("text_output") is None
    assert found["top_ids"].shape == found["top_logprobs"].shape == (2, 2, longest, 2)
    assert found["cross_attentions"].shape == (2, 2, longest, len(case["input_ids"]))
    assert np.allclose(found["logprobs"].sum(axis=2), found["sequence_logprobs"], atol=1e-4) and (found["logprobs"] <= 0).all()
    whole = json.loads(only(result, "result"))
    assert [len(row) for row in whole["sequences"]] == [2, 2] and whole["usage"], whole
    assert found["output_lengths"].max() == longest and (found["scores"][:, 0] >= found["scores"][:, 1]).all()
    # Beginnings of targets.
    begun = rpc.infer("demo", [texts(grpc, text), texts(grpc, expected.split()[0], name="decoder_text")])
    assert (expected.split()[0] + only(begun)).replace(" ", "") == expected.replace(" ", ""), begun.as_numpy("text_output")
    lists = {"suppress_tokens": json.dumps(greedy[:1]), "stop_strings": '["xyz"]', "options": "{}"}
    assert rpc.infer("demo", [texts(grpc, text)], parameters=lists).as_numpy("output_ids")[0][0] != greedy[0]
    word = expected.split()[1]
    result = rpc.infer("demo", [texts(grpc, text)], parameters={"stop_strings": word})
    assert (only(result, "finish_reason"), only(result)) == ("stop_string", expected[: expected.index(word) + len(word)]), only(result)
    regex = {"regex": "[0-9]{3}", "max_new_tokens": 20}
    assert len(only(web.infer("demo", [texts(http, text)], parameters=regex))) == 3

    # Triton's batches: the first axis is the batch.
    result = rpc.infer("batched", [texts(grpc, text, text, text, shape=[3, 1])])
    assert result.as_numpy("text_output").tolist() == [[expected.encode()]] * 3 and result.as_numpy("output_ids").shape == (3, 1, len(greedy))

    async def many():
        async with aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            results = await asyncio.gather(*(client.infer("batched", [texts(grpc, text, shape=[1, 1])]) for _ in range(40)))
            return {only(result) for result in results}

    assert asyncio.run(many()) == {expected}
    return expected


def check_generate(server, rpc, expected):
    case = CASES[0]
    body = {"text_input": case["text"], "max_new_tokens": 64, "id": "g"}
    for name, more in (("demo", {}), ("demo", {"stream": True}), ("demo_stream", {"stream": False})):
        status, answer = server.get(f"/v2/models/{name}/generate", body | more)
        answer = json.loads(answer)
        assert status == 200 and answer["text_output"] == expected and answer["output_ids"] == case["greedy"], answer
        assert answer["id"] == "g" and answer["finish_reason"] == "eos", answer
    found = json.loads(server.get("/v2/models/demo/generate", {"text_input": [case["text"]] * 2, "num_beams": 2})[1])
    assert found["text_output"] == [expected] * 2, found

    pieces = events(server, "demo_stream", body)
    assert "".join(piece["text_output"] for piece in pieces) == expected and len(pieces) > 10, pieces
    assert sum((listed(piece["output_ids"]) for piece in pieces), []) == case["greedy"], pieces
    assert [piece.get("finish_reason") for piece in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1]["finish_reason"] == "eos"
    pieces = events(server, "demo_stream", body | {"num_beams": 4})
    assert "".join(piece["text_output"] for piece in pieces) == expected and abs(pieces[-1]["scores"] - case["beam4_score"]) < 1e-4
    assert [piece["text_output"] for piece in events(server, "demo", body)] == [expected]
    assert [piece["text_output"] for piece in events(server, "demo_stream", body | {"stream": False})] == [expected]
    refused_json(server, "/v2/models/demo_stream/generate_stream", body | {"text_input": ["a", "b"]}, 400, "parameters.stream: expected false")

    results = Stream(rpc, "demo_stream", [texts(grpc, case["text"])], request_id="s").all()
    assert "".join(map(only, results)) == expected and len(results) > 10
    assert sum((result.as_numpy("output_ids")[0].tolist() for result in results), []) == case["greedy"]
    assert {result.get_response().id for result in results} == {"s"} and only(results[-1], "finish_reason") == "eos"


def check_encoders(web, rpc):
    text = "The meeting starts at 9:05 am on Elm St."
    ids = [numbers(http, "input_ids", [[7, 8, 9], [9, 8, 7]])]
    refused(lambda: web.infer("labels", [texts(http, text)]), "token ids")
    result = web.infer("labels", ids)
    scores, labels = result.as_numpy("scores"), result.as_numpy("label")
    assert scores.shape == (2, 2) and list(labels) == [labels[0]] * 2 and np.allclose(scores.sum(axis=1), 1, atol=1e-5), scores
    raw = web.infer("labels", ids, parameters={"raw_scores": True}).as_numpy("scores")
    assert np.allclose(np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True), scores, atol=1e-5), raw
    result = rpc.infer("tokens", [numbers(grpc, "input_ids", [[5, 6, 7]])])
    assert result.as_numpy("scores").shape[:2] == (1, 3) and result.as_numpy("output_mask").tolist() == [[1, 1, 1]]
    for name in ("vectors", "states"):
        both = rpc.infer(name, [texts(grpc, text, "a")]).as_numpy("embedding")
        assert both.shape == (2, 160) and np.allclose(np.linalg.norm(both, axis=1), 1, atol=1e-5)
        alone = rpc.infer(name, [texts(grpc, text)]).as_numpy("embedding")
        assert np.allclose(both[0], alone[0], atol=1e-5)
    plain = rpc.infer("states", [texts(grpc, text)], parameters={"normalize": False, "pooling": "first"}).as_numpy("embedding")
    states = rpc.infer("states", [texts(grpc, text)], parameters={"pooling": "none"}).as_numpy("last_hidden_state")
    assert states.shape[2] == 160 and np.allclose(states[0][0], plain[0], atol=1e-5)
    # The model's own pooling.
    own = rpc.infer("vectors", [texts(grpc, text)], parameters={"normalize": False}).as_numpy("embedding")
    assert np.allclose(own, plain, atol=1e-5)


def check_refusals(server, web, rpc):
    text = texts(http, CASES[0]["text"])
    infer = "/v2/models/demo/infer"
    for inputs, words in [
        ([numbers(http, "input_ids", [[5, 1 << 40]])], ["input_ids"]),
        ([numbers(http, "input_ids", [[-1]])], ["input_ids"]),
        ([numbers(http, "input_ids", np.zeros((2, 0)))], ["input_ids: expected [rows, length]", "[2, 0]"]),
        ([numbers(http, "input_ids", [[5]]), numbers(http, "attention_mask", [[1, 1]])], ["attention_mask: expected the shape of input_ids, found [1, 2]"]),
        ([numbers(http, "attention_mask", [[1]])], ["inputs: expected one of text_input, input_ids and messages, found none"]),
        ([text, numbers(http, "input_ids", [[5]])], ["found text_input and input_ids"]),
        ([texts(http, name="text_input", shape=[0])], ["text_input: expected at least one row, found [0]"]),
        ([texts(http, b"\xff\xfe")], ["UTF-8"]),
        ([texts(http, "a " * 200000)], ["512"]),
        ([text, texts(http, "a", "b", name="decoder_text")], ["decoder"]),
        ([text, texts(http, "no picture", name="images")], ["image"]),
        ([text, numbers(http, "image_counts", [1])], ["image_counts: expected images"]),
        ([texts(http, '[{"role": "user", "content": "a"}]', name="messages")], ["chat"]),
    ]:
        refused(lambda inputs=inputs: web.infer("demo", inputs), *words)
    refused(lambda: web.infer("demo", [texts(http, *"ab", shape=[1, 2])]), "text_input")
    one = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    for body, words in [
        ({"inputs": [one | {"shape": [2]}]}, []),
        ({"inputs": [one | {"datatype": "INT32", "data": [1]}]}, ["text_input"]),
        ({"inputs": [one | {"name": "text"}]}, ["text"]),
        ({"inputs": [one, one | {"name": "more"}]}, ["more"]),
        ({"inputs": []}, []),
        ({"inputs": [one], "outputs": [{"name": "none"}]}, ["none"]),
        ({"inputs": [one], "parameters": {"stop": ["a"]}}, []),
        ({"inputs": [one | {"shape": [1 << 62, 4]}]}, []),
    ]:
        refused_json(server, infer, body, 400, *words)
    # The raw data of a text that is longer than the tensor.
    head = json.dumps({"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}]}).encode()
    for data in (b"\x09\0\0\0a", b"\x00\0\0\0a", b"\xff\xff\xff\xffa"):
        found, answer = server.get(infer, head + data, {"Inference-Header-Content-Length": str(len(head))})
        assert found == 400, answer
    for parameters, words in [
        ({"num_beams": -1}, ["num_beams", "-1"]),
        ({"num_beams": 1.5}, ["num_beams", "1.5"]),
        ({"temperature": -1.5, "do_sample": True}, ["temperature", "-1.5"]),
        ({"num_bems": 1}, ["num_bems"]),
        ({"max_new_tokens": 1 << 40}, ["expected at most 512"]),
        ({"max_new_tokens": "many"}, ["max_new_tokens"]),
        ({"options": "{"}, ["parameters.options: expected"]),
        ({"options": "[1]"}, ["parameters.options: expected a JSON object"]),
        ({"options": "[" * 100000}, ["parameters.options: expected at most 64 levels"]),
        ({"options": '{"num_beams": 2}', "num_beams": 2}, ["parameters.num_beams: expected the option in one place"]),
        ({"stream": 3}, ["parameters.stream: expected true or false, found 3"]),
        ({"queue_priority": "highest"}, ["parameters.queue_priority: expected high, normal or low, found 'highest'"]),
        ({"regex": "("}, ["regex"]),
        ({"adapter": "none"}, ["adapter"]),
    ]:
        refused(lambda parameters=parameters: rpc.infer("demo", [texts(grpc, "a")], parameters=parameters), "INVALID_ARGUMENT", *words)
    refused(lambda: web.infer("demo", [text], headers={"X-Priority": "highest"}), "parameters.queue_priority: expected high, normal or low")
    assert only(web.infer("demo", [text], headers={"X-Tenant": "a", "X-Priority": "low"}))
    refused(lambda: rpc.infer("labels", [numbers(grpc, "input_ids", [[7]])], parameters={"num_beams": 2}), "INVALID_ARGUMENT", "num_beams")
    refused(lambda: rpc.infer("states", [texts(grpc, "a")], parameters={"pooling": "most"}), "parameters.pooling: expected none, mean, first or last")
    refused(lambda: web.infer("demo_stream", [text]), "decoupled")
    refused(lambda: Stream(rpc, "demo_stream", [texts(grpc, "a")], parameters={"num_beams": 0}).all(), "num_beams")
    rpc.stop_stream()
    refused_json(server, "/v2/models/demo_stream/generate", {"text_input": "a"}, 200, "error")
    refused_json(server, "/v2/models/none/infer", {"inputs": [one]}, 404)


def check_times(server, rpc):
    """Deadlines, priorities, and what Triton's statistics tell."""
    text = texts(grpc, CASES[0]["text"])
    started = time.monotonic()
    refused(lambda: rpc.infer("demo", [text], parameters=ENDLESS | {"num_beams": 4}, timeout=30000), "CANCELLED", "deadline")
    refused_json(server, "/v2/models/demo/generate", {"text_input": "a", "timeout": 20000, **ENDLESS}, 400, "deadline")
    assert time.monotonic() - started < 10
    refused(lambda: rpc.infer("demo", [text], parameters=ENDLESS | {"num_beams": 4}, client_timeout=0.05), "DEADLINE_EXCEEDED")
    server.wait_until_idle(10, "demo")

    # Two requests fill the engine of `beams`, so that others wait: those of a higher priority go first.
    before = server.statistics("bare.t5gemma")
    order = []

    def ask(name, parameters):
        rpc.infer("bare.t5gemma", [text], parameters=parameters)
        order.append(name)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        filling = [pool.submit(rpc.infer, "bare.t5gemma", [text], parameters=LONG | {"num_beams": 8}) for _ in range(8)]
        while not server.metrics()['t5gemma_rows_in_flight{engine="bare.t5gemma"}']:
            time.sleep(0.01)
        asked = [pool.submit(ask, name, {"queue_priority": name, "num_beams": 8, "tenant": name}) for name in ("low", "low", "high", "high")]
        for request in filling + asked:
            request.result()
    assert order.index("high") < order.index("low"), order
    after = server.statistics("bare.t5gemma")
    spent = {part: after[part]["ns"] - before[part]["ns"] for part in ("queue", "compute_infer", "success")}
    assert after["success"]["count"] == before["success"]["count"] + 12 and after["fail"]["count"] == 0, after
    # Four waited until others had ended, whatever the machine does.
    assert spent["queue"] > 0.1 * spent["success"] and spent["compute_infer"] > 0.1 * spent["success"], spent
    assert server.statistics("demo")["fail"]["count"] > 20
    # Metrics follow within some tenths of a second.
    end = time.monotonic() + PATIENCE
    while (metrics := server.metrics())['t5gemma_rows_in_flight{engine="bare.t5gemma"}']:
        assert time.monotonic() < end, metrics
        time.sleep(0.05)
    assert metrics['t5gemma_target_tokens_total{engine="bare.t5gemma"}'] > 1000, metrics


def clients(server_folder, backends, demo, tasks, work):
    forward = "--http-header-forward-pattern=X-(Priority|Tenant)"
    with Server(server_folder, backends, repository(work / "clients", demo, tasks), forward) as server:
        web = http.InferenceServerClient(f"127.0.0.1:{server.http}", network_timeout=PATIENCE, connection_timeout=PATIENCE)
        rpc = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        check_metadata(server, web)
        expected = check_infer(server, web, rpc)
        check_generate(server, rpc, expected)
        check_encoders(web, rpc)
        check_refusals(server, web, rpc)
        check_times(server, rpc)
        assert only(rpc.infer("demo", [texts(grpc, CASES[0]["text"])])) == expected
        server.wait_until_idle(10, "demo", "demo_stream", "batched", "beams", "bare.t5gemma", "labels", "vectors")
        # Triton waits for clients that keep a connection open.
        web.close()
        rpc.close()
        assert server.stop() == 0, server.text()


async def gathered(server, requests):
    """How each of these requests ended, as (model, text, options of the call) at once: a text, or the words of the error."""
    async with aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:

        async def one(name, text, more):
            try:
                return only(await client.infer(name, [texts(grpc, text)], **more))
            except InferenceServerException as error:
                return f"{error.status()}: {error.message()}"
            except asyncio.CancelledError:
                return "cancelled"

        return await asyncio.gather(*(one(*request) for request in requests))


def leave(server, path, body):
    """A client of HTTP that goes before the answer."""
    body = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.http)) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
        while not server.metrics()['t5gemma_requests_in_flight{model="demo_stream"}']:
            time.sleep(0.01)


def faults(server_folder, backends, demo, tasks, work):
    """Clients that cancel, leave, come all at once or set deadlines."""
    folder = work / "faults"
    folder.mkdir()
    more = parameter("max_waiting", "1024") + parameter("threads", "2")
    model(folder, "demo", demo, more)
    model(folder, "demo_stream", demo, more)
    with Server(server_folder, backends, folder) as server:
        rpc = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        text = CASES[0]["text"]
        expected = only(rpc.infer("demo", [texts(grpc, text)]))

        def client(number):
            """Every fifth request is cancelled: alone, or as a stream after some responses."""
            own = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
            for turn in range(20):
                if turn % 5 == 0 and number % 2:
                    stream = Stream(own, "demo_stream", [texts(grpc, text)], parameters=ENDLESS)
                    stream.next()
                    own.stop_stream(cancel_requests=True)
                elif turn % 5 == 0:
                    done = queue.Queue()
                    call = own.async_infer("demo", [texts(grpc, text)], lambda result, error: done.put(error), parameters=ENDLESS)
                    time.sleep(0.002 * number)
                    call.cancel()
                    assert "CANCELLED" in str(done.get(timeout=PATIENCE).status())
                elif turn % 2:
                    assert "".join(map(only, Stream(own, "demo_stream", [texts(grpc, text)]).all())) == expected
                else:
                    assert only(own.infer("demo", [texts(grpc, text)])) == expected
            own.close()

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            for finished in pool.map(client, range(10)):
                assert finished is None
        server.wait_until_idle(10, "demo", "demo_stream")

        # More than may wait: the rest is told so at once, and memory stays bounded.
        before = server.memory()
        ended = collections.Counter(asyncio.run(gathered(server, [("demo", text, {"parameters": {"num_beams": 4}})] * 1600)))
        full = sum(count for words, count in ended.items() if "UNAVAILABLE" in words and "1024" in words)
        assert ended[expected] >= 1024 and ended[expected] + full == 1600, ended
        assert server.memory() - before < 400e6, (before, server.memory())
        server.wait_until_idle(10, "demo")

        # All clients give up at once, and Triton's own deadline for as many.
        late = [("demo", text, {"parameters": ENDLESS, "client_timeout": 0.3})] * 400
        late += [("demo", text, {"parameters": ENDLESS, "timeout": 300000})] * 400
        ended = asyncio.run(gathered(server, late))
        assert all("DEADLINE_EXCEEDED" in words or "CANCELLED" in words for words in ended), collections.Counter(ended)
        server.wait_until_idle(10, "demo")

        for _ in range(20):
            leave(server, "/v2/models/demo_stream/generate_stream", {"text_input": text, **ENDLESS})
        server.wait_until_idle(10, "demo_stream")
        for _ in range(3):
            asyncio.run(gathered(server, [("demo", text, {"client_timeout": 0.05 if at % 5 == 0 else 60}) for at in range(200)]))
        server.wait_until_idle(10, "demo")
        assert only(rpc.infer("demo", [texts(grpc, text)])) == expected
        rpc.close()
        assert server.stop() == 0 and "Segmentation" not in server.text(), server.text()


def repeated(server, name, count, more):
    """Requests in a thread of their own; returns what waits for how they ended."""
    ended = []
    thread = threading.Thread(target=lambda: ended.extend(asyncio.run(gathered(server, [(name, CASES[0]["text"], more)] * count))))
    thread.start()
    while server.metrics()[f't5gemma_requests_in_flight{{model="{name}"}}'] < count:
        time.sleep(0.005)

    def wait():
        thread.join(PATIENCE)
        return ended

    return wait


def reload(server_folder, backends, demo, tasks, work):
    """Models that come and go while they are asked, and the end of the server."""
    folder, moving = work / "reload", work / "moving"
    folder.mkdir()
    shutil.copytree(demo, moving)
    model(folder, "demo", moving)
    model(folder, "demo_stream", moving)
    slow = {"parameters": LONG | {"max_new_tokens": 100, "min_new_tokens": 100}}
    with Server(server_folder, backends, folder) as server:
        rpc = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        text = CASES[0]["text"]
        expected = only(rpc.infer("demo", [texts(grpc, text)], **slow))
        wait = repeated(server, "demo", 16, slow)
        assert server.get("/v2/repository/models/demo/unload", {})[0] == 200
        assert wait() == [expected] * 16
        refused(lambda: rpc.infer("demo", [texts(grpc, text)]), "demo")
        assert only(Stream(rpc, "demo_stream", [texts(grpc, text)], parameters=slow["parameters"] | {"stream": False}).all()[0]) == expected
        assert server.get("/v2/repository/models/demo/load", {})[0] == 200
        # Again while it is asked. Triton opens a model anew if files of its version have changed; the same folder keeps its engine.
        version = folder / "demo/1/version"
        version.write_text("1")
        wait = repeated(server, "demo", 16, slow)
        assert server.get("/v2/repository/models/demo/load", {})[0] == 200
        assert wait() == [expected] * 16
        # Files exported anew are opened anew, whoever still uses the old ones.
        shutil.copytree(demo, work / "fresh")
        moving.rename(work / "old")
        (work / "fresh").rename(moving)
        version.write_text("2")
        wait = repeated(server, "demo", 16, slow)
        assert server.get("/v2/repository/models/demo/load", {})[0] == 200
        assert wait() == [expected] * 16 and only(rpc.infer("demo", [texts(grpc, text)], **slow)) == expected

        assert server.text().count("shares what") == 3, server.text()

        # A reload that fails leaves the old model.
        config = folder / "demo/config.pbtxt"
        for wrong, words in [
            (parameter("model", "none"), "parameters.model: expected a model folder"),
            (parameter("model", str(work)), "manifest.json"),
            (parameter("model", str(moving)) + parameter("max_rows", "many"), "parameters.max_rows: expected an integer, found 'many'"),
            (parameter("model", str(moving)) + parameter("options", "{"), "parameters.options: expected"),
            (parameter("model", str(moving)) + parameter("max_rows", "32"), "parameters.max_rows: expected none as in model 'demo'"),
            (parameter("model", str(moving)) + parameter("task", "translation"), "parameters.task: expected feature-extraction"),
            (parameter("model", str(moving)) + parameter("library", "/none.so"), "parameters.library"),
        ]:
            config.write_text('backend: "t5gemma"\n' + wrong)
            status, answer = server.get("/v2/repository/models/demo/load", {})
            assert status == 400 and words in answer, (words, answer)
            assert only(rpc.infer("demo", [texts(grpc, text)])), wrong
        # A typing error is told of.
        config.write_text('backend: "t5gemma"\n' + parameter("model", str(moving)) + parameter("max_row", "32"))
        assert server.get("/v2/repository/models/demo/load", {})[0] == 200
        assert "parameters.max_row is ignored" in server.text()

        rpc.close()

    # The end: what was accepted is answered. Another server, because Triton 2.51 waits in vain for a reload that has failed, whatever
    # the backend, until its --exit-timeout-secs.
    config.write_text('backend: "t5gemma"\n' + parameter("model", str(moving)))
    with Server(server_folder, backends, folder) as server:
        wait = repeated(server, "demo", 16, slow)
        started = time.monotonic()
        server.process.terminate()
        assert wait() == [expected] * 16
        status = server.stop()
        assert status == 0, server.text()[-3000:]
        print(f"ended {time.monotonic() - started:.1f} s after SIGTERM", file=sys.stderr)


def exact(server_folder, backends, demo, tasks, work):
    """The held-out sentences of the demo: 984 of 1000 answers are exact."""
    folder = work / "exact"
    folder.mkdir()
    model(folder, "demo", demo)
    model(folder, "demo_stream", demo)
    rows = [json.loads(line) for line in (DEMO / "eval.jsonl").read_text().splitlines()]
    with Server(server_folder, backends, folder) as server:

        async def ask(client, room, row):
            async with room:
                return only(await client.infer("demo", [texts(grpc, row["text"])], parameters={"max_new_tokens": 96}))

        async def all_rows():
            room = asyncio.Semaphore(64)
            async with aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
                return await asyncio.gather(*(ask(client, room, row) for row in rows))

        found = asyncio.run(all_rows())
        right = sum(text == row["target"] for text, row in zip(found, rows, strict=True))
        assert (len(rows), right) == (1000, 984), right
        for row, text in list(zip(rows, found, strict=True))[:100:5]:
            pieces = events(server, "demo_stream", {"text_input": row["text"], "max_new_tokens": 96})
            assert "".join(piece["text_output"] for piece in pieces) == text
        assert server.stop() == 0


def exported(server_folder, backends, demo, tasks, work):
    """The repository that `t5gemma-export --triton-repository` has written, moved together with the model folder."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    found = {}
    for file in sorted((work / "repository").glob("*/config.pbtxt")):
        config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
        found[config.name] = config.model_transaction_policy.decoupled
        assert config.name == file.parent.name and config.backend == "t5gemma" and len(config.model_warmup) == 1, config
    assert found == {"beside": False, "beside_stream": True, "inside": False, "inside_stream": True, "labels": False}, found
    assert not [file for file in work.rglob("*.partial*")]
    (work / "moved").mkdir()
    for folder in ("repository", "models"):
        (work / folder).rename(work / "moved" / folder)
    # Everything may be said by the configuration and the backend's own completion of it.
    with Server(server_folder, backends, work / "moved/repository") as server:
        text = CASES[0]["text"]
        rpc = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        for name in ("beside", "inside"):
            assert rpc.infer(name, [texts(grpc, text)]).as_numpy("output_ids")[0].tolist() == CASES[0]["greedy"]
            assert events(server, f"{name}_stream", {"text_input": text})[-1]["finish_reason"] == "eos"
            # One request of the warm-up, and one of this check.
            assert server.statistics(name)["success"]["count"] >= 1 and server.statistics(name)["fail"]["count"] == 0
        assert rpc.infer("labels", [numbers(grpc, "input_ids", [[5, 6]])]).as_numpy("label").shape == (1,)
        rpc.close()
        assert server.stop() == 0


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    globals()[name](*map(Path, folders))
    print(name)
