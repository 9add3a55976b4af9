"""Triton Inference Server with the backend t5gemma, on ports of its own, for triton_checks.py."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

# How long anything may take on a busy machine, in seconds.
PATIENCE = 60


class Server:
    """A running server. `log` is the file of its messages."""

    def __init__(self, triton, backends, repository, *options):
        self.log = repository.parent / f"{repository.name}.log"
        for _ in range(3):
            # Triton takes no port 0. Another program may take a port between here and there.
            with contextlib.ExitStack() as stack:
                sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
                self.http, self.grpc, self.metrics_port = (each.getsockname()[1] for each in sockets)
            ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics_port}
            addresses = [f"--{door}-{what}" for door, port in ports.items() for what in ("address=127.0.0.1", f"port={port}")]
            command = [Path(triton) / "pytriton/tritonserver/bin/tritonserver", f"--model-repository={repository}"]
            command += [f"--backend-directory={backends}", *addresses, "--model-control-mode=explicit", "--load-model=*"]
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    [*command, "--exit-timeout-secs=20", *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            if self.is_ready():
                return
            self.stop()
            if "already in use" not in self.text() and "Failed to bind" not in self.text():
                break
        raise AssertionError(f"tritonserver did not start:\n{self.text()}")

    def text(self):
        return self.log.read_text(errors="replace")

    def is_ready(self):
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if self.get("/v2/health/ready")[0] == 200 and self.metrics():
                    return True
            time.sleep(0.05)
        return False

    def get(self, path, body=None, headers=None):
        """Status and text of an answer over HTTP."""
        body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", data=body, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self):
        """The values of Triton's metrics port by name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def wait_until_idle(self, seconds, *models):
        """Waits until nothing is in flight."""
        names = [f't5gemma_requests_in_flight{{model="{model}"}}' for model in models]
        end = time.monotonic() + seconds
        while busy := [name for name in names if self.metrics()[name]]:
            assert time.monotonic() < end, f"{busy} after {seconds} s"
            time.sleep(0.02)

    def statistics(self, model):
        (found,) = json.loads(self.get(f"/v2/models/{model}/stats")[1])["model_stats"]
        return found["inference_stats"]

    def response_statistics(self, model):
        (found,) = json.loads(self.get(f"/v2/models/{model}/stats")[1])["model_stats"]
        return found["response_stats"]

    def memory(self):
        """Resident bytes."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, seconds=PATIENCE):
        """Ends the server as an orchestrator does; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.process.kill()
        self.process.wait()
        if kind is not None:
            print(self.text()[-5000:])


def model(repository, name, folder=None, more="", config=True):
    """Adds a model to a repository; `folder` is its parameter `model`."""
    (repository / name / "1").mkdir(parents=True)
    if config:
        text = 'backend: "t5gemma"\n' + more
        if folder:
            text += parameter("model", str(folder))
        (repository / name / "config.pbtxt").write_text(text)


def parameter(key, value):
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}\n'
