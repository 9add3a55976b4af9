#!/usr/bin/env python3
"""Treats a running `t5gemma serve` badly: `serve_load.py WHAT HOST:PORT [PID [SECONDS]]`, where the server has the model `demo` and WHAT
is malformed, slow, leaving, deadlines, ending or soak. Prints WHAT if the server has kept its promises.

`slow` needs a server with --header-timeout 1 --read-timeout 1; `ending` and `soak` need its PID, `ending` ends it."""

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
import zlib

TEXTS = ["Dr. Smith paid $3.50 on May 3, 2019.", "It is 3:05 pm.", "The meeting starts at 9:05 am on Elm St.", "a"]
random.seed(5)


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)


def head(method, path, body, headers=(), version="1.1"):
    lines = [f"{method} {path} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def connect(address):
    host, port = address.rsplit(":", 1)
    return await asyncio.open_connection(host, int(port), limit=1 << 24)


async def ask(address, method, path, body=None, headers=(), leave_after=None):
    """The answer; None if the client left before it was there, `leave_after` seconds after it had asked."""
    reader, writer = await connect(address)
    try:
        writer.write(head(method, path, b"" if body is None else json.dumps(body).encode(), headers))
        await writer.drain()
        try:
            all_of_it = await asyncio.wait_for(reader.read(-1), leave_after)
        except asyncio.TimeoutError:
            return None
    finally:
        writer.close()
        # A client that leaves resets; one that has its answer does not care.
        writer.transport.abort()
    top, _, body = all_of_it.partition(b"\r\n\r\n")
    lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        body, rest, has_ended = b"", body, False
        while rest and not has_ended:
            size, _, rest = rest.partition(b"\r\n")
            has_ended = int(size, 16) == 0
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        assert has_ended, "the answer is cut off"
    elif "content-length" in headers:
        assert len(body) == int(headers["content-length"]), "the answer is cut off"
    assert lines[0], "no answer"
    return Answer(int(lines[0].split()[1]), headers, body)


async def metrics(address):
    text = (await ask(address, "GET", "/metrics")).body.decode()
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


async def wait_until_idle(address, seconds):
    """Waits until nothing is in flight; returns how long that took."""
    begun = time.monotonic()
    while True:
        found = await metrics(address)
        busy = {name: found[name] for name in ('t5gemma_rows_in_flight{model="demo"}', 't5gemma_rows_waiting{model="demo"}', "t5gemma_requests_in_flight") if found[name]}
        if not busy:
            return time.monotonic() - begun
        assert time.monotonic() - begun < seconds, f"after {seconds} s: {busy}"
        await asyncio.sleep(0.002)


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


async def raw(address, data, seconds=20, is_whole=False):
    """What comes back for bytes, whole requests or bytes that end in the middle of one."""
    reader, writer = await connect(address)
    try:
        writer.write(data)
        await writer.drain()
        # To the server, the end of what a client says is the end of the client.
        if not is_whole:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(-1), seconds)
    except (ConnectionError, OSError):
        return b""
    finally:
        writer.transport.abort()


async def malformed(address):
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = frame(4, 0, 0, b"")
    http1 = [
        (b"\x00" * 100, 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n", 431),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nXYZ\r\n", 422),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n", 422),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{", 422),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ]
    for data, status in http1:
        found = await raw(address, data)
        # A connection that only ends is an answer as well, where a request was cut off.
        assert not found or found.split()[1] == str(status).encode(), (data[:60], found[:200])
    http2 = [
        preface,
        preface + b"\xff" * 1000,
        preface + settings + frame(0, 0, 1, b"data before headers"),
        preface + settings + frame(1, 4, 1, b"\xff" * 30),
        preface + settings + frame(1, 4, 2, b""),
        preface + settings + frame(9, 4, 1, b"a continuation of nothing"),
        preface + settings + (1 << 23).to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 1]),
        preface + frame(4, 1, 0, b"xxxxxx"),
        preface + settings + frame(8, 0, 0, b"\x00\x00\x00\x00"),
        # Streams that are opened and reset at once.
        preface + settings + b"".join(frame(1, 5, 1 + 2 * at, b"\x83\x86\x84") + frame(3, 0, 1 + 2 * at, b"\0\0\0\x08") for at in range(5000)),
        preface[:10],
        preface[:10] + b"x" * 20,
    ]
    for data in http2:
        await raw(address, data)
    for _ in range(300):
        await raw(address, bytes(random.randrange(256) for _ in range(random.randrange(1, 200))))
        await raw(address, preface + settings + bytes(random.randrange(256) for _ in range(random.randrange(1, 200))))
    deep = "[" * 100_000
    bodies = [deep, '{"inputs": ' + deep, '{"a":' * 100_000, "nul", '{"inputs": "\\ud800"}', '{"inputs": 1e999}', "{}" * 1000, '{"inputs": "a", "inputs": "b"}', "\ufeff{}"]
    for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/embed", "/v2/models/demo/infer", "/v2/models/demo/generate", "/v1/t5gemma", "/"):
        for body in bodies:
            found = await raw(address, head("POST", path, body.encode()), is_whole=True)
            status = int(found.split()[1])
            assert 200 <= status < 500 or status == 501, (path, body[:40], found[:200])
    for coding, body, status in [
        ("gzip", b"no gzip", 422),
        ("gzip", zlib.compress(b"{}"), 422),
        ("br", b"x", 422),
        ("deflate", zlib.compress(b" " * (1 << 27)), 413),
        ("gzip", zlib.compress(b" " * (1 << 27), wbits=31), 413),
        ("gzip", zlib.compress(b'{"inputs": "a"}', wbits=31), 200),
        ("deflate", zlib.compress(b'{"inputs": "a"}'), 200),
    ]:
        found = await raw(address, head("POST", "/generate", body, [f"Content-Encoding: {coding}"]), is_whole=True)
        assert found.split()[1] == str(status).encode(), (coding, status, found[:200])
    assert (await ask(address, "GET", "/health")).status == 200
    await wait_until_idle(address, 5)


async def slow(address):
    """Clients that send or read too slowly lose their connections, and those that others wait for are answered."""

    async def ended(data, seconds):
        reader, writer = await connect(address)
        writer.write(data)
        begun = time.monotonic()
        try:
            await asyncio.wait_for(reader.read(-1), seconds)
        except ConnectionError:
            pass
        writer.transport.abort()
        return time.monotonic() - begun

    async def loris():
        """A header line now and then."""
        reader, writer = await connect(address)
        writer.write(b"GET / HTTP/1.1\r\n")
        for _ in range(100):
            writer.write(b"a: b\r\n")
            await asyncio.sleep(0.2)
            if reader.at_eof():
                return
        raise AssertionError("still open")

    begun = [b"", b"P", b"PRI * HTTP/2.0\r\n", b"GET", b"GET / HTTP/1.1\r\nHost:", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"]
    times = await asyncio.gather(*(ended(data, 20) for data in begun * 20), *(loris() for _ in range(20)))
    assert all(0.5 < time < 10 for time in times if time is not None), times
    # A stream that nobody reads: its rows end, although there is more than the sockets hold.
    host, port = address.rsplit(":", 1)
    held = []
    for _ in range(2):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect((host, int(port)))
        # Some four megabytes.
        request = {"prompt": TEXTS * 8, "max_tokens": 500, "min_new_tokens": 500, "stream": True}
        client.sendall(head("POST", "/v1/completions", json.dumps(request).encode()))
        held.append(client)
    await asyncio.sleep(0.5)
    assert (await metrics(address))["t5gemma_requests_in_flight"] == 2
    assert (await ask(address, "POST", "/generate", {"inputs": "a"})).status == 200
    await wait_until_idle(address, 60)
    for client in held:
        client.close()


def doors(new_tokens, beams):
    """A request for each door that generates."""
    options = {"max_new_tokens": new_tokens, "num_beams": beams}
    text = random.choice(TEXTS)
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [text]}
    openai = {"prompt": text, "max_tokens": new_tokens, "num_beams": beams}
    return [
        ("/v1/completions", openai),
        ("/v1/completions", {**openai, "stream": True}),
        ("/generate", {"inputs": text, "parameters": options}),
        ("/generate_stream", {"inputs": text, "parameters": options}),
        ("/", {"inputs": [text, text], "parameters": options}),
        ("/v2/models/demo/infer", {"inputs": [tensor], "parameters": options}),
        ("/v2/models/demo/generate", {"text_input": text, **options}),
        ("/v2/models/demo/generate_stream", {"text_input": text, **options}),
        ("/v1/t5gemma", {"text": text, "options": options}),
    ]


async def over_grpc(address, new_tokens, beams, is_stream, leave_after):
    import numpy
    import tritonclient.grpc.aio as grpc

    async with grpc.InferenceServerClient(address) as client:
        tensor = grpc.InferInput("text_input", [1], "BYTES")
        tensor.set_data_from_numpy(numpy.array([random.choice(TEXTS).encode()], dtype=numpy.object_))
        options = {"max_new_tokens": new_tokens, "num_beams": beams}

        async def requests():
            yield {"model_name": "demo", "inputs": [tensor], "parameters": options}
            await asyncio.sleep(100)

        async def answered():
            if not is_stream:
                return await client.infer("demo", [tensor], parameters=options, compression_algorithm="gzip")
            async for result, error in client.stream_infer(requests()):
                assert error is None, error
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return result

        try:
            return await asyncio.wait_for(answered(), leave_after)
        except asyncio.TimeoutError:
            return None


async def leaving(address):
    """A fifth of the clients leave at random moments, on every door; the others are answered, and nothing stays."""

    async def client(number):
        leave_after = random.uniform(0, 0.6) if number % 5 == 0 else None
        new_tokens = 400 if leave_after else random.choice([5, 20, 40])
        beams = random.choice([1, 1, 4])
        if number % 11 == 0:
            found = await over_grpc(address, new_tokens, beams, number % 2 == 0, leave_after)
        else:
            path, body = random.choice(doors(new_tokens, beams))
            found = await ask(address, "POST", path, body, leave_after=leave_after)
            assert found is None or found.status == 200, (path, found.status, found.body)
        assert leave_after or found is not None

    for _ in range(3):
        await asyncio.gather(*(client(number) for number in range(110)))
        await wait_until_idle(address, 1)


async def leave_times(address):
    """How long it takes until the server knows that a client has left, and until its rows have ended."""
    times, last = [], None
    for number in range(90):
        path, body = doors(500, random.choice([1, 4, 8]))[number % 9]
        options = body.get("parameters") or body.get("options") or body
        options["min_new_tokens"] = 500
        left = (await metrics(address))["t5gemma_client_disconnected_total"]
        assert await ask(address, "POST", path, body, leave_after=random.uniform(0.03, 0.1)) is None
        begun, known, polls = time.monotonic(), None, 0
        while True:
            asked = time.monotonic()
            found = await metrics(address)
            polls = max(polls, time.monotonic() - asked)
            if known is None and found["t5gemma_client_disconnected_total"] > left:
                known = time.monotonic() - begun
            now = time.monotonic() - begun
            rows, requests = found['t5gemma_rows_in_flight{model="demo"}'], found["t5gemma_requests_in_flight"]
            if rows == 0 == requests:
                break
            last = (rows, requests, round(1000 * now))
        times.append((round(1000 * now), f"known after {round(1000 * (known or 0))}", f"longest poll {round(1000 * polls)}", f"rows, requests, time before {last}", path, options["num_beams"]))
        last = None
    times.sort()
    print(f"rows stay {times[len(times) // 2][0]} ms, 9 of 10 {times[len(times) * 9 // 10][0]} ms, the longest are {times[-6:]}", file=sys.stderr)


async def deadlines(address):
    """Requests with hardly any time are refused or answered, and nothing stays."""
    async def client(number):
        path, body = random.choice(doors(300, random.choice([1, 4])))
        found = await ask(address, "POST", path, body, [f"X-Request-Timeout: {random.choice([0, 0.001, 0.05, 0.2])}"])
        # A stream begins before its time is over, and says so in its last event.
        assert found.status in (200, 504) or found.status == 429, (path, found.status, found.body[:200])
        return found.status

    statuses = await asyncio.gather(*(client(number) for number in range(400)))
    assert statuses.count(504) > 50, statuses
    await wait_until_idle(address, 2)


async def ending(address, pid):
    """SIGTERM while many ask: whoever was accepted is answered in full."""
    counts = {"answered": 0, "refused": 0}
    is_told = asyncio.Event()

    async def client(number):
        while True:
            path, body = random.choice(doors(random.choice([10, 60]), random.choice([1, 4])))
            try:
                found = await ask(address, "POST", path, body)
            except (ConnectionRefusedError, ConnectionResetError):
                # Not accepted.
                assert is_told.is_set()
                return
            except AssertionError as error:
                assert is_told.is_set() and str(error) == "no answer", error
                return
            if found.status == 503:
                assert is_told.is_set() and "retry-after" in found.headers, (path, found.headers)
                counts["refused"] += 1
                return
            assert found.status == 200, (path, found.status, found.body[:200])
            counts["answered"] += 1

    clients = [asyncio.create_task(client(number)) for number in range(40)]
    await asyncio.sleep(1.5)
    is_told.set()
    os.kill(pid, signal.SIGTERM)
    await asyncio.gather(*clients)
    # Most of the clients were being served.
    assert counts["answered"] >= 20, counts
    print(counts, file=sys.stderr)


def resident(pid):
    with open(f"/proc/{pid}/status") as status:
        (line,) = (line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def soak(address, pid, seconds):
    """Mixed load; resident memory is flat after its first fifth."""
    end = time.monotonic() + seconds
    counts = {"answered": 0, "left": 0, "refused": 0}

    async def client(number):
        while time.monotonic() < end:
            leave_after = random.uniform(0, 0.3) if random.random() < 0.1 else None
            kind = random.random()
            if kind < 0.03:
                found = await over_grpc(address, 20, 1, random.random() < 0.5, leave_after)
                status = 200
            elif kind < 0.1:
                found = await ask(address, "POST", "/embed", {"inputs": random.sample(TEXTS, 2)}, leave_after=leave_after)
                status = found and found.status
            elif kind < 0.15:
                found = await ask(address, "POST", "/generate", random.choice([{}, {"inputs": 5}, {"inputs": "a", "parameters": {"num_beams": 0}}]))
                status = 200 if found.status == 422 else found.status
            else:
                path, body = random.choice(doors(random.choice([1, 10, 40, 100]), random.choice([1, 1, 1, 4])))
                options = body.get("parameters") or body.get("options") or body
                if random.random() < 0.2:
                    options |= {"do_sample": True, "seed": number, "top_p": 0.9}
                found = await ask(address, "POST", path, body, leave_after=leave_after)
                status = found and found.status
            if found is None:
                counts["left"] += 1
            elif status == 429:
                counts["refused"] += 1
            else:
                assert status == 200, (status, found.body[:300])
                counts["answered"] += 1

    async def watch():
        found = []
        while time.monotonic() < end:
            found.append(resident(pid))
            await asyncio.sleep(max(0.5, seconds / 300))
        return found

    watched, *_ = await asyncio.gather(watch(), *(client(number) for number in range(24)))
    await wait_until_idle(address, 2)
    fifth = max(1, len(watched) // 5)
    early, late = max(watched[fifth : 2 * fifth]), max(watched[-fifth:])
    text = f"{seconds:.0f} s, {counts}, resident {watched[0]:.0f} MiB at first, {early:.0f} MiB in the second fifth, {late:.0f} MiB in the last"
    print(text, file=sys.stderr)
    # Heaps are not given back at once: short runs end before they are.
    assert late < early * 1.1 + (8 if seconds >= 300 else 32), text
    assert counts["answered"] > seconds, text


if __name__ == "__main__":
    what, address, *more = sys.argv[1:]
    more = [int(number) for number in more]
    asyncio.run({"malformed": malformed, "slow": slow, "leaving": leaving, "leave_times": leave_times, "deadlines": deadlines, "ending": ending, "soak": soak}[what](address, *more))
    print(what)
