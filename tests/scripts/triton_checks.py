#!/usr/bin/env python3
"""Asks Triton Inference Server with the backend t5gemma as its users do: `triton_checks.py CHECK TRITON BACKENDS DEMO TASKS WORK`, with
the folders of the server, of the backends, of the demo model, and of the models of other tasks by name. Prints the check's name if all
answers are right."""

import asyncio
import concurrent.futures
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as aio
import tritonclient.http as http

from triton_asks import CASES, DEMO, ENDLESS, LONG, Stream, events, listed, numbers, only, refused, refused_json, texts
from triton_faults import faults, reload
from triton_server import PATIENCE, Server, model, parameter


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


def refused_request(call, *words):
    """Where files lie is nothing for clients."""
    message = refused(call, *words)
    assert not re.search(r"(^|[\s'\"(:])/\w+/", message), message


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
        refused_request(lambda inputs=inputs: web.infer("demo", inputs), *words)
    refused_request(lambda: web.infer("demo", [texts(http, *"ab", shape=[1, 2])]), "text_input")
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
        refused_request(lambda parameters=parameters: rpc.infer("demo", [texts(grpc, "a")], parameters=parameters), "INVALID_ARGUMENT", *words)
    refused_request(lambda: web.infer("demo", [text], headers={"X-Priority": "highest"}), "parameters.queue_priority: expected high, normal or low")
    assert only(web.infer("demo", [text], headers={"X-Tenant": "a", "X-Priority": "low"}))
    refused_request(lambda: rpc.infer("labels", [numbers(grpc, "input_ids", [[7]])], parameters={"num_beams": 2}), "INVALID_ARGUMENT", "num_beams")
    refused_request(lambda: rpc.infer("states", [texts(grpc, "a")], parameters={"pooling": "most"}), "parameters.pooling: expected none, mean, first or last")
    refused_request(lambda: web.infer("demo_stream", [text]), "decoupled")
    refused_request(lambda: Stream(rpc, "demo_stream", [texts(grpc, "a")], parameters={"num_beams": 0}).all(), "num_beams")
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
    # Of a decoupled model each response is counted: here only those of streams, and the empty ones at their ends.
    before, pieces = server.response_statistics("demo_stream"), len(events(server, "demo_stream", {"text_input": CASES[0]["text"]}))
    assert pieces > 10, pieces
    expected = {str(index): ("success" if index < pieces else "empty_response") for index in range(pieces + 1)}
    none = {"success": {"count": 0}, "empty_response": {"count": 0}}
    # Statistics follow when a response was sent.
    end = time.monotonic() + PATIENCE
    while True:
        after = server.response_statistics("demo_stream")
        counts = {index: after.get(index, none)[kind]["count"] - before.get(index, none)[kind]["count"] for index, kind in expected.items()}
        if set(counts.values()) == {1}:
            break
        assert time.monotonic() < end, (counts, after)
        time.sleep(0.05)
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
    checks = {check.__name__: check for check in (clients, exact, exported, faults, reload)}
    checks[name](*map(Path, folders))
    print(name)
