#!/usr/bin/env python3
"""What `t5gemma serve` costs over its engine: `serve_bench.py T5GEMMA MODEL [ROUNDS]`. Interleaves runs of `t5gemma bench --clients`, which
has the engine in its process, with the same requests over HTTP, and prints medians of both and of their ratios. With wrk, also the requests a
second of a handler that does nothing. Last, the CPU time of the server's threads other than the engine's, for each request and each
token, which a busy machine changes less."""

import asyncio
import contextlib
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time

SOURCE, TOKENS = 128, 48


def engine(program, model, clients, source, tokens, repeat):
    flags = ["--clients", clients, "--source-length", source, "--max-new-tokens", tokens, "--repeat", repeat, "--warmup", 1, "--json"]
    found = json.loads(subprocess.run([program, "bench", model, *map(str, flags)], check=True, capture_output=True, text=True).stdout)
    return found["tokens_per_second"], found["request_ms"]["median"]


async def client(port, length, tokens, count, is_stream, times):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    for _ in range(count):
        ids = [random.randrange(10, 200000) for _ in range(length)]
        body = json.dumps({"input_ids": ids, "options": {"max_new_tokens": tokens, "min_new_tokens": tokens}}).encode()
        accept = "text/event-stream" if is_stream else "application/json"
        begun = time.perf_counter()
        writer.write(b"POST /v1/t5gemma HTTP/1.1\r\nHost: x\r\nAccept: %s\r\nContent-Length: %d\r\n\r\n" % (accept.encode(), len(body)) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head
        while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
            piece = await reader.readexactly(size + 2)
        assert b'"error"' not in piece, piece
        await reader.readexactly(2)
        times.append(1e3 * (time.perf_counter() - begun))
    writer.close()


async def over_http(port, clients, source, tokens, repeat, is_stream):
    """As the engine's clients are: sources from an eighth of the longest to the longest."""
    shortest = -(-source // 8)
    lengths = [min(source, shortest + (source - shortest) * (at * 7 % clients) // max(1, clients - 1)) for at in range(clients)]
    await asyncio.gather(*(client(port, length, tokens, 1, is_stream, []) for length in lengths))
    times, begun = [], time.perf_counter()
    await asyncio.gather(*(client(port, length, tokens, repeat, is_stream, times) for length in lengths))
    return clients * repeat * tokens / (time.perf_counter() - begun), statistics.median(times)


def cpu_times(pid):
    """Nanoseconds that each thread has run."""
    times = {}
    for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            times[thread.name] = int((thread / "schedstat").read_text().split()[0])
    return times


def door_costs(server, port):
    """Microseconds of CPU that a request and a token cost outside of the engine."""

    def run(count, tokens, is_stream):
        before = cpu_times(server.pid)
        asyncio.run(client(port, 16, tokens, count, is_stream, []))
        after = cpu_times(server.pid)
        return {thread: (time - before.get(thread, 0)) / 1e3 for thread, time in after.items()}

    # Threads that work for tens of milliseconds on a request are the engine's.
    run(5, 1, False)
    engine = {thread for thread, time in run(5, 200, False).items() if time / 5 > 15_000}
    door = lambda *of: sum(time for thread, time in run(*of).items() if thread not in engine)
    one, whole, stream = door(200, 1, False) / 200, door(10, 200, False) / 10, door(10, 200, True) / 10
    print(f"outside of the engine: {one:.0f} us of CPU a request, {(whole - one) / 200:.0f} us a token, {(stream - one) / 200:.0f} us a streamed token")


def main():
    program, model, *more = sys.argv[1:]
    rounds = int(more[0]) if more else 3
    server = subprocess.Popen([program, "serve", f"--model=demo={model}", "--port=0", "--max-rows=64"], stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if "listening on" in line:
            port = int(line.rsplit(":", 1)[1])
        if line.strip().endswith("ready"):
            break
    try:
        for clients, source, tokens, repeat in ((1, 16, 1, 60), (1, 16, TOKENS, 8), (8, SOURCE, TOKENS, 4), (32, SOURCE, TOKENS, 3)):
            found = []
            for _ in range(rounds):
                own = engine(program, model, clients, source, tokens, repeat)
                whole = asyncio.run(over_http(port, clients, source, tokens, repeat, False))
                stream = asyncio.run(over_http(port, clients, source, tokens, repeat, True))
                found.append((own, whole, stream))
            median = lambda values: statistics.median(list(values))
            rates = [median(run[way][0] for run in found) for way in range(3)]
            ratios = [median(run[way][0] / run[0][0] for run in found) for way in (1, 2)]
            waits = [median(run[way][1] for run in found) for way in range(3)]
            print(f"{clients} clients, sources to {source}, {tokens} tokens: engine {rates[0]:.0f}, whole {rates[1]:.0f} ({ratios[0]:.3f}), streams {rates[2]:.0f} ({ratios[1]:.3f}) tokens/s; "
                  f"a request {waits[0]:.2f}, {waits[1]:.2f}, {waits[2]:.2f} ms; a streamed token {1e3 * (waits[2] - waits[1]) / tokens:.0f} us", flush=True)
        if shutil.which("wrk"):
            done = subprocess.run(["wrk", "-t1", "-c32", "-d5s", f"http://127.0.0.1:{port}/v2/health/live"], capture_output=True, text=True)
            print([line.strip() for line in done.stdout.splitlines() if "Requests/sec" in line or "Non-2xx" in line])
        door_costs(server, port)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
