"""t5gemma.ray.Deployment under Ray Serve: ray_serve.py MODEL EVAL EXACT. Of the demo's sentences, EXACT have
to come out as expected."""

import collections
import concurrent.futures
import http.client
import json
import socket
import sys
import time

import ray_local

PORT = 9200
TEXT = "Dr. Smith paid $3.50 on May 3, 2019."
ENDLESS = {"suppress_tokens": [1], "max_new_tokens": 500}


def ask(request, accept="application/json"):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        connection.request("POST", "/", json.dumps(request), {"Content-Type": "application/json", "Accept": accept})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def wait_for(what, condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, f"a minute, and not {what}"
        time.sleep(0.05)


def answers(sentences):
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda at: ask({"id": at, "text": sentences[at]["text"], "options": {"max_new_tokens": 96}}), range(len(sentences))))
    exact = 0
    for at, (status, _, body) in enumerate(found):
        assert status == 200, body
        result = json.loads(body)
        assert result["id"] == at and result["usage"]["target_tokens"] > 0
        exact += result["sequences"][0][0]["text"] == sentences[at]["target"]
    return exact


def streaming():
    status, headers, body = ask({"id": "s", "text": TEXT, "options": {"max_new_tokens": 64}}, "text/event-stream")
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), (status, headers)
    events = [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n") if line]
    *pieces, result = events
    assert len(pieces) > 1 and "".join(piece["text"] for piece in pieces) == result["sequences"][0][0]["text"]
    assert result["id"] == "s" and result["sequences"][0][0]["text"].startswith("doctor smith paid three dollars")
    status, _, body = ask({"text": TEXT, "options": {"max_new_tokens": 64, "num_beams": 4}}, "text/event-stream")
    assert status == 200 and json.loads(body.split("\n\n")[-2].removeprefix("data: "))["usage"]


def refusals():
    for request, part in (
        ({"text": TEXT, "options": {"num_beams": 0}}, "num_beams"),
        ({"text": TEXT, "options": {"num_beam": 2}}, "num_beam"),
        ({"text": TEXT, "options": {"tenant": "x"}}, "options.tenant"),
        ({"text": TEXT, "temperature": 1}, "temperature: unknown field"),
        ({"text": [TEXT, TEXT]}, "expected one, found 2"),
        ({"text": TEXT, "input_ids": [5]}, "found text and input_ids"),
        ({}, "expected one of text, messages, input_ids, found none"),
        ([], "JSON object"),
    ):
        for accept in ("application/json", "text/event-stream"):
            status, _, body = ask(request, accept)
            assert status == 400 and part in json.loads(body)["error"], (status, body)


def departures(stats):
    """Clients that leave end their rows."""
    for accept in ("application/json", "text/event-stream"):
        before = stats()
        body = json.dumps({"text": TEXT, "options": ENDLESS}).encode()
        head = f"POST / HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", PORT)) as client:
            client.sendall(head.encode() + body)
            if accept == "text/event-stream":
                assert client.recv(1000)
            else:
                wait_for("in flight", lambda: stats()["rows"])
        wait_for("ended", lambda: not stats()["rows"])
        now = stats()
        assert (now["failed"], now["finished"]) == (before["failed"] + 1, before["finished"]), f"{accept}: {before} {now}"


def overload():
    """Statuses of 40 requests at once, for an engine of 2 rows and 2 that wait."""
    request = {"text": TEXT, "options": {**ENDLESS, "max_new_tokens": 300}}
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: ask(request), range(40)))
    for status, headers, body in found:
        assert status in (200, 429), (status, body)
        assert status == 200 or int(headers["retry-after"]) >= 1, headers
    return collections.Counter(status for status, *_ in found)


def replacement(serve, model):
    """A replica whose engine has ended is replaced."""
    import t5gemma.ray

    class Breakable(t5gemma.ray.Deployment.func_or_class):
        def end(self):
            self._engine.shutdown()

    deployment = serve.deployment(Breakable, health_check_period_s=1, ray_actor_options={"num_cpus": 1})
    handle = serve.run(deployment.bind(model), name="t5gemma", route_prefix="/")
    assert ask({"text": TEXT})[0] == 200
    handle.end.remote().result()
    assert ask({"text": TEXT})[0] == 503
    wait_for("another replica", lambda: ask({"text": TEXT})[0] == 200)


def autoscaling(serve):
    """Requests that wait start a second replica."""
    running = lambda: serve.status().applications["t5gemma"].deployments["t5gemma"].replica_states.get("RUNNING", 0)  # noqa: E731
    wait_for("one replica", lambda: running() == 1)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        is_over = False

        def client():
            while not is_over:
                assert ask({"text": TEXT, "options": ENDLESS})[0] == 200

        clients = [pool.submit(client) for _ in range(16)]
        try:
            wait_for("two replicas", lambda: running() == 2 or any(one.done() for one in clients))
        finally:
            is_over = True
        [one.result() for one in clients]


def main(model, lines, exact):
    ray_local.leave_the_network()
    with open(lines, encoding="utf-8") as file:
        sentences = [json.loads(line) for line in file]
    with ray_local.cluster(2):
        from ray import serve

        import t5gemma.ray

        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        deployment = t5gemma.ray.Deployment.options(autoscaling_config={"min_replicas": 1, "max_replicas": 1})
        handle = serve.run(deployment.bind(model), name="t5gemma", route_prefix="/")
        stats = lambda: handle.stats.remote().result()  # noqa: E731
        streaming()
        refusals()
        departures(stats)
        rows = handle.generate.remote([TEXT, TEXT], max_new_tokens=64).result()
        pieces = list(handle.options(stream=True).stream.remote(TEXT, max_new_tokens=64))
        assert rows[0][0].text == rows[1][0].text == "".join(pieces), (rows, pieces)
        found = answers(sentences)
        assert found == int(exact), found
        print(f"{len(sentences)} answers, {found} as expected")

        # The engine's limits, and Serve's own: more requests than a replica takes wait in line, up to a number.
        for name, options, engine in (
            ("the engine's queue is full", {}, {"max_rows": 2, "max_waiting": 2}),
            ("Serve's queue is full", {"max_ongoing_requests": 2, "max_queued_requests": 2}, {}),
        ):
            serve.run(deployment.options(**options).bind(model, engine=engine), name="t5gemma", route_prefix="/")
            counts = overload()
            assert counts[200] >= 2 and counts[429] >= 20, (name, counts)
            print(f"{name}: {counts[200]} answered, {counts[429]} refused with Retry-After")
        scale = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4, "upscale_delay_s": 1, "look_back_period_s": 2}
        deployment = deployment.options(autoscaling_config={**scale, "metrics_interval_s": 1}, graceful_shutdown_timeout_s=1)
        serve.run(deployment.bind(model), name="t5gemma", route_prefix="/")
        autoscaling(serve)
        print("a second replica has come")
        replacement(serve, model)
        print("a replica with an engine that has ended was replaced")
        serve.shutdown()
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
