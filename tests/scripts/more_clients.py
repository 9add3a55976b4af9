#!/usr/bin/env python3
"""Asks `t5gemma serve` with clients that are too large for every run, and fuzzes it by its OpenAPI document:
`more_clients.py T5GEMMA HOST:PORT`, where the model is `demo`. Prints what has been answered. Needs the packages of more_clients.txt."""

import asyncio
import pathlib
import subprocess
import sys
import tempfile

TEXT = "Dr. Smith paid $3.50 on May 3, 2019."


async def kserve(address, expected):
    import numpy
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import RESTConfig

    base = f"http://{address}"
    rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    assert await rest.is_server_ready(base) and await rest.is_server_live(base) and await rest.is_model_ready(base, "demo")
    asked = InferRequest(model_name="demo", infer_inputs=[InferInput("text_input", [1], "BYTES", data=[TEXT])], parameters={"num_beams": 2})
    answer = await rest.infer(base, asked, model_name="demo")
    assert answer.outputs[0].data == [expected], answer
    grpc = InferenceGRPCClient(address)
    assert await grpc.is_server_ready() and await grpc.is_model_ready("demo")
    tensor = InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(numpy.array([TEXT.encode()], dtype=numpy.object_))
    answer = await grpc.infer(InferRequest(model_name="demo", infer_inputs=[tensor], parameters={"num_beams": 2}))
    (found,) = answer.outputs[0].as_numpy()
    assert found in (expected, expected.encode()), found


def text_generation(address, expected):
    from text_generation import Client

    client = Client(f"http://{address}")
    answer = client.generate(TEXT, max_new_tokens=40)
    assert answer.generated_text == expected and answer.details.finish_reason == "eos_token", answer
    events = list(client.generate_stream(TEXT, max_new_tokens=40))
    assert events[-1].generated_text == expected and "".join(event.token.text for event in events) == expected, events


def langchain(address, expected):
    from langchain_huggingface import HuggingFaceEndpoint

    endpoint = HuggingFaceEndpoint(endpoint_url=f"http://{address}", max_new_tokens=40, task="text-generation")
    assert endpoint.invoke(TEXT) == expected
    streamed = HuggingFaceEndpoint(endpoint_url=f"http://{address}", max_new_tokens=40, streaming=True).stream(TEXT)
    assert "".join(streamed) == expected


def llama_index(address, _):
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    client = TextEmbeddingsInference(base_url=f"http://{address}", model_name="demo")
    one, both = client.get_text_embedding(TEXT), client.get_text_embedding_batch([TEXT, "a"])
    assert len(both) == 2 and max(abs(a - b) for a, b in zip(one, both[0])) < 1e-4


def schemathesis(address, _):
    """No server error, and no answer that the document does not have."""
    program = pathlib.Path(sys.executable).with_name("schemathesis")
    # Loading and unloading would leave the others without their model.
    left_out = ["--exclude-path-regex", "/v2/repository/models/"]
    checks = ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
    # It writes what it finds into the folder that it runs in.
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([program, "run", f"http://{address}/openapi.json", "--max-examples", "30", "--seed", "1", "--request-timeout", "60", *checks, *left_out], check=True, cwd=folder)


def main():
    program, address = sys.argv[1:]
    # What the first client is told is what the others have to be told.
    import json
    import urllib.request

    request = urllib.request.Request(f"http://{address}/generate", json.dumps({"inputs": TEXT}).encode())
    expected = json.load(urllib.request.urlopen(request))["generated_text"]
    assert expected.startswith("doctor smith paid"), expected
    for client in (kserve, text_generation, langchain, llama_index, schemathesis):
        result = client(address, expected)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
        print(client.__name__, flush=True)
    check = pathlib.Path(__file__).with_name("deploy_files.py")
    subprocess.run([sys.executable, check, program, address], check=True)


if __name__ == "__main__":
    main()
