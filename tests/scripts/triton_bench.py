#!/usr/bin/env python3
"""What the doors cost: `triton_bench.py TRITON BACKENDS T5GEMMA MODEL [ROUNDS [TOKENS]]`. Asks the backend in Triton Inference Server and
`t5gemma serve` with the same gRPC client, in turns with runs of `t5gemma bench --clients`, which has the engine in its process, and prints
the medians of tokens a second and of their ratios to the engine's. Only one of the three has anything to do at a time."""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as aio

from serve_bench import engine
from triton_server import Server, model

SOURCE = 128


async def client(asked, name, length, tokens, count):
    parameters = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    for _ in range(count):
        ids = grpc.InferInput("input_ids", [1, length], "INT64")
        ids.set_data_from_numpy(np.array([[random.randrange(10, 200000) for _ in range(length)]]))
        found = await asked.infer(name, [ids], parameters=parameters)
        assert found.as_numpy("output_ids").size == tokens


async def rate(port, name, clients, tokens, repeat):
    """As the engine's clients are: sources from an eighth of the longest to the longest."""
    shortest = -(-SOURCE // 8)
    lengths = [min(SOURCE, shortest + (SOURCE - shortest) * (at * 7 % clients) // max(1, clients - 1)) for at in range(clients)]
    async with aio.InferenceServerClient(f"127.0.0.1:{port}") as asked:
        await asyncio.gather(*(client(asked, name, length, tokens, 1) for length in lengths))
        begun = time.perf_counter()
        await asyncio.gather(*(client(asked, name, length, tokens, repeat) for length in lengths))
        return clients * repeat * tokens / (time.perf_counter() - begun)


def main():
    triton, backends, program, folder = sys.argv[1:5]
    rounds, tokens = (int(word) for word in (sys.argv[5:7] + ["3", "48"][len(sys.argv[5:7]) :]))
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch, "models")
        repository.mkdir()
        model(repository, "model", Path(folder).resolve())
        serve = subprocess.Popen([program, "serve", "--port", "0", f"--model=model={folder}"], stderr=subprocess.PIPE, text=True)
        while "listening" not in (line := serve.stderr.readline()):
            assert line, "it has ended"
        port = int(line.rsplit(":", 1)[1].split()[0].rstrip("/"))
        try:
            with Server(triton, backends, repository) as server:
                for clients, repeat in ((1, 4), (8, 4), (32, 2)):
                    found = {"engine": [], "Triton": [], "serve": []}
                    for _ in range(rounds):
                        found["engine"].append(engine(program, folder, clients, SOURCE, tokens, repeat)[0])
                        found["Triton"].append(asyncio.run(rate(server.grpc, "model", clients, tokens, repeat)))
                        found["serve"].append(asyncio.run(rate(port, "model", clients, tokens, repeat)))
                    shown = ", ".join(f"{name} {statistics.median(rates):.0f}" for name, rates in found.items())
                    ratio = lambda name: statistics.median(own / of for own, of in zip(found[name], found["engine"]))
                    print(f"{clients} clients: {shown} tokens/s; Triton {ratio('Triton'):.2f}, serve {ratio('serve'):.2f} of the engine", flush=True)
        finally:
            serve.terminate()
            serve.wait()


if __name__ == "__main__":
    main()
