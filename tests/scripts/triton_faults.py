"""What clients do to a server that is not ready for them, and what its operators do: the checks `faults` and `reload` of
triton_checks.py."""

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

import tritonclient.grpc as grpc
import tritonclient.grpc.aio as aio
from tritonclient.utils import InferenceServerException

from triton_asks import CASES, ENDLESS, LONG, Stream, only, refused, texts
from triton_server import PATIENCE, Server, model, parameter


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
