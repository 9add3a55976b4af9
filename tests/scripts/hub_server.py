"""A stand-in for the Hugging Face hub on this machine: the requests that downloads of models need, and faults on demand.

    hub_server.py LOG [--tls PEM] < SETTINGS.json

Prints its port, and writes each request to LOG as a line of JSON. Ends when stdin is closed: SETTINGS.json is its first line.

    {"repositories": {"ORG/NAME": {"folder": DIR, "commit": SHA, "revisions": ["main", "v1"], "access": "gated" | TOKEN}},
     "faults": [{"path": REGEX, "method": "GET", "times": N, "status": N, "headers": {}, "cut": N, "whole": true, "garble": true,
                 "stall": true}]}

As on the hub, weights are redirected to another host, which refuses the hub's token; other files are redirected within the hub;
a request for compressed content gets no ranges.
"""

import gzip
import hashlib
import http.server
import json
import re
import ssl
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit


def etag(path, content):
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        """As a proxy, it is every other host."""
        self.send_response(200)
        self.end_headers()

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        entry = {"method": self.command, "path": path, "range": self.headers.get("Range"), "host": self.headers["Host"]}
        entry["token"] = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with self.server.lock:
            self.server.log.write(json.dumps(entry) + "\n")
            self.server.log.flush()
            fault = next((fault for fault in self.server.settings.get("faults", []) if self.is_hit(fault, path)), {})
            if fault:
                fault["times"] = fault.get("times", 1) - 1
        if fault.get("status"):
            return self.send(fault["status"], fault.get("headers", {}))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self.listing(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            return self.tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+|additional_chat_templates/[^/]+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            return self.file(match[1], match[3], fault)
        if match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            if self.headers.get("Authorization"):
                return self.send(400, {"X-Error-Message": "two ways to authenticate"})
            return self.file(match[1], match[2], fault)
        return self.send(404)

    def is_hit(self, fault, path):
        return fault.get("times", 1) > 0 and self.command == fault.get("method", "GET") and re.search(fault["path"], path)

    def repository(self, name, revision):
        """The repository, if this request may read it; or None after an answer."""
        found = self.server.settings["repositories"].get(name)
        access = found.get("access") if found else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        is_listing = self.path.startswith("/api/models/")
        if token == "hf_invalid":
            self.send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif not found or access not in (None, "gated", token):
            # Without a token, the hub does not tell whether there is such a repository.
            self.send(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        elif access == "gated" and token != "hf_accepted" and not is_listing:
            message = f"Access to model {name} is restricted."
            self.send(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        elif revision not in (*found["revisions"], found["commit"]):
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return found

    def files(self, found):
        root = Path(found["folder"])
        return [(str(path.relative_to(root)), path) for path in sorted(root.rglob("*")) if path.is_file()]

    def tree(self, name, revision):
        """What huggingface_hub asks for besides."""
        if found := self.repository(name, revision):
            files = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag("", path.read_bytes())}
                for name, path in self.files(found)
            ]
            self.send(200, {"Content-Type": "application/json"}, json.dumps(files).encode())

    def listing(self, name, revision):
        if found := self.repository(name, revision):
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in self.files(found)]
            body = {"id": name, "modelId": name, "sha": found["commit"], "siblings": siblings, "gated": False, "tags": []}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def resolve(self, name, revision, file):
        if not (found := self.repository(name, revision)):
            return
        path = Path(found["folder"], file)
        headers = {"X-Repo-Commit": found["commit"]}
        if not path.is_file():
            return self.send(404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        if file.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{etag(file, content)}"', "X-Linked-Size": str(len(content))}
            # The same server by another name.
            host = f"localhost:{self.server.server_port}"
            scheme = "https" if self.server.is_tls else "http"
            return self.send(302, {**headers, "Location": f"{scheme}://{host}/storage/{name}/{file}"})
        location = f"/api/resolve-cache/models/{name}/{found['commit']}/{file}"
        return self.send(307, {**headers, "Location": location})

    def file(self, name, file, fault):
        found = self.server.settings["repositories"][name]
        content = Path(found["folder"], file).read_bytes()
        headers = {"ETag": f'"{etag(file, content)}"', "X-Repo-Commit": found["commit"], "Accept-Ranges": "bytes"}
        if fault.get("garble"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            return self.send(200, {**headers, "Content-Encoding": "gzip"}, gzip.compress(content))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not fault.get("whole"):
            start, size = int(asked[1]), len(content)
            end = min(int(asked[2] or size - 1), size - 1)
            if start >= size:
                return self.send(416, {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            return self.send(206, headers, content[start : end + 1], fault)
        return self.send(200, headers, content, fault)

    def send(self, status, headers={}, body=b"", fault={}):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: fault.get("cut", len(body))])
        self.wfile.flush()
        if fault.get("stall"):
            time.sleep(3600)
        if "cut" in fault:
            self.close_connection = True
            self.connection.close()


def main():
    settings = json.loads(sys.stdin.readline())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.settings, server.log, server.lock = settings, open(sys.argv[1], "a"), threading.Lock()
    server.is_tls = "--tls" in sys.argv
    if server.is_tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[sys.argv.index("--tls") + 1])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
