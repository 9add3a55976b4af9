#!/usr/bin/env python3
"""Asks `t5gemma serve` with clients that people use: `serve_clients.py CLIENT HOST:PORT TEXT EXPECTED`, where the model `demo` answers
TEXT by EXPECTED, `chat` is the same model with a chat template, and `labels` classifies. Prints the client's name if all answers are right."""

import asyncio
import json
import queue
import sys
import time
import urllib.request

import numpy as np


def openai(address, text, expected):
    import openai

    client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="key", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo", "labels", "chat"]
    assert client.models.retrieve("demo").id == "demo"

    complete = client.completions.create
    answer = complete(model="demo", prompt=text, logprobs=1, max_tokens=30, n=1, seed=1, stop=["xyz"], extra_body={"num_beams": 2})
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected, "stop"), answer
    assert "".join(choice.logprobs.tokens[:-1]) == expected and len(choice.logprobs.top_logprobs) == answer.usage.completion_tokens, choice
    for beams in (2, 1):
        asked = dict(model="demo", prompt=text, logprobs=2, max_tokens=30, extra_body={"num_beams": beams})
        whole, chunks = complete(**asked).choices[0].logprobs, list(complete(stream=True, **asked))
        pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        assert len(pieces) > 10 and [chunk.choices[0].text for chunk in chunks if not chunk.choices[0].logprobs] in ([], [""]), chunks
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert sum((getattr(piece, field) for piece in pieces), []) == getattr(whole, field), (field, chunks)
    answer = complete(model="demo", prompt=[text, "a"], n=2, temperature=0.7, seed=1, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3], answer
    assert complete(model="demo", prompt=text, temperature=0, seed=3, top_p=0.5).choices[0].text == expected
    chunks = list(complete(model="demo", prompt=text, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected, chunks
    assert len(chunks) > 10 and chunks[-1].usage.completion_tokens == len(chunks) - 1 and not chunks[-1].choices, chunks
    word = expected.split()[2]
    cut = expected.split(word)[0]
    assert complete(model="demo", prompt=text, stop=word).choices[0].text == cut
    chunks = list(complete(model="demo", prompt=text, stop=[word], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut, chunks

    chat = client.chat.completions.create
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    answer = chat(model="chat", messages=messages, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected, answer
    logprobs = answer.choices[0].logprobs.content
    assert bytes(byte for token in logprobs[:-1] for byte in token.bytes).decode() == expected and len(logprobs[0].top_logprobs) == 2, logprobs
    chunks = list(chat(model="chat", messages=[{"role": "user", "content": text}], stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant", chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected, chunks
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.total_tokens > 0, chunks
    chunks = list(chat(model="chat", messages=messages, logprobs=True, top_logprobs=2, stream=True))
    pieces = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert len(pieces) > 10 and sum(pieces, []) == logprobs, chunks
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = chat(model="chat", messages=messages, response_format=form, max_completion_tokens=30).choices[0].message.content
    assert json.loads(answer)["a"] in (1, 2), answer

    vectors = client.embeddings.create(model="demo", input=[text, "a"])
    numbers = client.embeddings.create(model="demo", input=text, encoding_format="float")
    assert np.allclose(vectors.data[0].embedding, numbers.data[0].embedding, atol=1e-6) and vectors.usage.prompt_tokens > 0
    assert len(client.embeddings.create(model="demo", input=[[5, 6]], dimensions=3).data[0].embedding) == 3

    for call, error, code in [
        (lambda: complete(model="none", prompt="a"), openai.NotFoundError, "model_not_found"),
        (lambda: complete(model="demo", prompt="a", max_tokens=100000), openai.BadRequestError, None),
        (lambda: client.responses.create(model="demo", input="a"), openai.NotFoundError, None),
        (lambda: chat(model="demo", messages=messages), openai.BadRequestError, None),
    ]:
        try:
            call()
        except error as found:
            assert found.code == code, found
        else:
            raise AssertionError(f"no {error}")

    async def left():
        client = openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="key")
        answers = (client.completions.create(model="demo", prompt=text) for _ in range(40))
        assert {answer.choices[0].text for answer in await asyncio.gather(*answers)} == {expected}

    asyncio.run(left())


def huggingface_hub(address, text, expected):
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"http://{address}")
    assert client.text_generation(text) == expected
    details = client.text_generation(
        text, details=True, max_new_tokens=4, do_sample=True, seed=3, top_k=1, decoder_input_details=True, best_of=1, stop=["x"],
        top_n_tokens=2, return_full_text=False,
    )
    assert (details.details.finish_reason, details.details.generated_tokens, details.details.seed) == ("length", 4, 3), details
    assert expected.startswith(details.generated_text) and details.details.tokens[0].logprob <= 0, details
    assert "".join(client.text_generation(text, stream=True)) == expected
    whole = client.text_generation(text, details=True, top_n_tokens=2).details
    *others, last = client.text_generation(text, stream=True, details=True, top_n_tokens=2)
    assert [event.token.logprob for event in [*others, last]] == [token.logprob for token in whole.tokens], others
    assert [event.top_tokens for event in [*others, last]] == whole.top_tokens, others
    assert all(event.generated_text is None for event in others) and len(others) > 10, others
    assert (last.generated_text, last.details.finish_reason) == (expected, "eos_token"), last
    assert client.text_generation(text, grammar={"type": "regex", "value": "a[bc]"}, max_new_tokens=5) in ("ab", "ac")
    # langchain sends these always.
    assert client.text_generation(text, do_sample=False, temperature=0.8, top_p=0.95, typical_p=0.95, watermark=False) == expected
    assert client.summarization(text, generate_parameters={"max_new_tokens": 30}).summary_text == expected
    assert client.translation(text, src_lang="en", tgt_lang="de").translation_text == expected
    assert client.sentence_similarity(text, other_sentences=[text, "a"])[0] > 0.999
    chat = InferenceClient(base_url=f"http://{address}", api_key="key").chat_completion([{"role": "user", "content": text}], model="chat")
    assert chat.choices[0].message.content == expected, chat


def text_tensor(client, texts, **more):
    tensor = client.InferInput("text_input", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_), **more)
    return tensor


def check_repository(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("demo") and not client.is_model_ready("none")
    client.unload_model("labels")
    assert not client.is_model_ready("labels")
    client.load_model("labels")
    assert client.is_model_ready("labels")


def wait_for_rows(address, count, seconds=10):
    """Waits until this many rows are in flight."""
    end = time.monotonic() + seconds
    while True:
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        (rows,) = (float(line.split()[1]) for line in lines if line.startswith('t5gemma_rows_in_flight{model="demo"}'))
        if rows == count:
            return
        assert time.monotonic() < end, f"{rows} rows in flight, not {count}"
        time.sleep(0.005)


def tritonclient_http(address, text, expected):
    import tritonclient.http as http

    client = http.InferenceServerClient(address)
    check_repository(client)
    assert client.get_server_metadata()["name"] == "t5gemma"
    assert {port["name"] for port in client.get_model_metadata("demo")["outputs"]} == {"text_output", "output_ids", "finish_reason"}
    assert client.get_model_config("demo")["max_batch_size"] == 0
    assert [model["state"] for model in client.get_model_repository_index()] == ["READY"] * 3
    result = client.infer("demo", [text_tensor(http, [text, text])], request_id="7", parameters={"num_beams": 2})
    assert list(result.as_numpy("text_output")) == [expected.encode()] * 2 and result.get_response()["id"] == "7"
    for binary in (True, False):
        outputs = [http.InferRequestedOutput("text_output", binary_data=binary), http.InferRequestedOutput("output_ids")]
        result = client.infer("demo", [text_tensor(http, [text], binary_data=not binary)], outputs=outputs)
        assert result.as_numpy("text_output")[0] in (expected, expected.encode()) and result.as_numpy("output_ids").shape[0] == 1
    ids = http.InferInput("input_ids", [1, 2], "INT64")
    ids.set_data_from_numpy(np.array([[7, 8]], dtype=np.int64))
    result = client.infer("labels", [ids])
    assert result.as_numpy("scores").shape == (1, 3) and len(result.as_numpy("label")) == 1
    assert client.get_inference_statistics("demo")["model_stats"][0]["inference_count"] > 0
    try:
        client.infer("none", [ids])
    except http.InferenceServerException as error:
        assert "no model of the name" in error.message(), error
    else:
        raise AssertionError("a model that is not served")


def check_reflection(channels, address):
    """The service's descriptors: every message and field has the number and type of Triton's own."""
    from google.protobuf import descriptor_pb2
    from tritonclient.grpc import service_pb2

    def text(number, value):
        return bytes([number << 3 | 2, len(value)]) + value

    with channels.insecure_channel(address) as channel:
        for version in (b"v1", b"v1alpha"):
            ask = channel.stream_stream(f"/grpc.reflection.{version.decode()}.ServerReflection/ServerReflectionInfo")
            services, found = ask(iter([text(7, b"*"), text(4, b"inference.GRPCInferenceService")]))
            assert b"inference.GRPCInferenceService" in services and b"grpc.health.v1.Health" in services, services
    theirs = descriptor_pb2.FileDescriptorProto()
    service_pb2.DESCRIPTOR.CopyToProto(theirs)
    config = {field.name: field for field in theirs.message_type}
    (begin,) = [at for at in range(len(found)) if found[at : at + 17] == b"\x0a\x0finference.proto"]
    own = descriptor_pb2.FileDescriptorProto.FromString(found[begin:])

    def compare(message, known):
        numbers = {field.name: (field.number, field.type, field.label) for field in known.field}
        for field in message.field:
            assert numbers[field.name] == (field.number, field.type, field.label), (message.name, field)
        nested = {inner.name: inner for inner in known.nested_type}
        for inner in message.nested_type:
            compare(inner, nested[inner.name])

    for message in own.message_type:
        compare(message, config[message.name])
    (service,), (known,) = own.service, theirs.service
    methods = {method.name: method for method in known.method}
    assert len(service.method) == 10
    for method in service.method:
        form = lambda it: (it.input_type, it.output_type, it.client_streaming, it.server_streaming)
        assert form(methods[method.name]) == form(method), method


def tritonclient_grpc(address, text, expected):
    import grpc as channels
    import tritonclient.grpc as grpc
    import tritonclient.grpc.aio as aio

    client = grpc.InferenceServerClient(address)
    check_repository(client)
    assert client.get_server_metadata().name == "t5gemma" and client.get_model_metadata("demo").outputs[0].name == "text_output"
    result = client.infer("demo", [text_tensor(grpc, [text])], request_id="7", parameters={"num_beams": 2, "stop_strings": '["xyz"]'})
    assert result.as_numpy("text_output")[0] == expected.encode() and result.get_response().id == "7"
    for model, more, code in [
        ("none", {}, "NOT_FOUND"),
        ("demo", {"parameters": {"num_bems": 2}}, "INVALID_ARGUMENT"),
        ("demo", {"client_timeout": 1e-4}, "DEADLINE_EXCEEDED"),
    ]:
        try:
            client.infer(model, [text_tensor(grpc, [text])], **more)
        except grpc.InferenceServerException as error:
            assert code in error.status(), error
        else:
            raise AssertionError(code)

    events = queue.Queue()
    client.start_stream(lambda result, error: events.put((result, error)))
    client.async_stream_infer("demo", [text_tensor(grpc, [text])], request_id="a", enable_empty_final_response=True)
    pieces, is_final = [], False
    while not is_final:
        result, error = events.get(timeout=30)
        assert error is None, error
        is_final = result.get_response().parameters["triton_final_response"].bool_param
        pieces += [] if is_final else [result.as_numpy("text_output")[0]]
    assert b"".join(pieces) == expected.encode() and len(pieces) > 10, pieces
    client.async_stream_infer("none", [text_tensor(grpc, [text])])
    _, error = events.get(timeout=30)
    assert "no model of the name" in error.message(), error
    client.stop_stream()

    # Clients that leave take their rows with them.
    endless = {"max_new_tokens": 500, "min_new_tokens": 500, "num_beams": 8}
    call = client.async_infer("demo", [text_tensor(grpc, [text])], callback=lambda result, error: None, parameters=endless)
    wait_for_rows(address, 8)
    call.cancel()
    wait_for_rows(address, 0)
    client.start_stream(lambda result, error: None)
    client.async_stream_infer("demo", [text_tensor(grpc, [text])], parameters=endless)
    wait_for_rows(address, 8)
    client.stop_stream(cancel_requests=True)
    wait_for_rows(address, 0)

    async def many():
        async with aio.InferenceServerClient(address) as client:
            results = await asyncio.gather(*(client.infer("demo", [text_tensor(grpc, [text])]) for _ in range(40)))
            assert {result.as_numpy("text_output")[0] for result in results} == {expected.encode()}

    asyncio.run(many())
    check_reflection(channels, address)
    with channels.insecure_channel(address) as channel:
        health = "/grpc.health.v1.Health/"
        # HealthCheckResponse with the status SERVING.
        assert channel.unary_unary(health + "Check")(b"") == b"\x08\x01"
        assert next(iter(channel.unary_stream(health + "Watch")(b""))) == b"\x08\x01"


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)
    print(name)
