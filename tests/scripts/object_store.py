"""A stand-in for a store that speaks S3, on this machine: the requests that batches need, checked as S3 checks them, and faults on demand.

    object_store.py ROOT [--faults SEED] [--no-conditions]

Prints its port; the object KEY of a bucket is the file ROOT/BUCKET/KEY. Ends when stdin is closed. The key id is `test`, and signatures
are calculated anew with the secret `secret`. With --faults, one request in four fails: an error before or after it has done its work, a
connection that is closed without an answer, or an answer that breaks off. `GET /_state` counts requests, faults and uploads; `POST /_faults`
with a number changes how often requests fail, in percent.
"""

import collections
import datetime
import hashlib
import hmac
import http.server
import json
import os
import random
import re
import sys
import threading
import uuid
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

# As in S3, but for listings, which have pages of few keys here so that there are several.
SMALLEST_PART, PAGE = 5 << 20, 3


class Refused(Exception):
    def __init__(self, status, code, message="refused"):
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


class State:
    def __init__(self, root, seed, has_conditions):
        self.root, self.has_conditions = Path(root), has_conditions
        self.lock = threading.Lock()
        self.chance, self.percent = random.Random(seed), 25 if seed is not None else 0
        self.uploads = {}
        self.counts = collections.Counter()

    def fault(self):
        with self.lock:
            if self.chance.random() * 100 >= self.percent:
                return None
            kind = self.chance.choice(["before", "after", "closed before", "closed after", "broken off"])
            self.counts["faults"] += 1
            self.counts[f"faults: {kind}"] += 1
            return kind

    def path(self, bucket, key):
        path = self.root / bucket / key
        if not path.resolve().is_relative_to((self.root / bucket).resolve()):
            raise Refused(400, "InvalidURI")
        return path

    def write(self, bucket, key, content, if_absent):
        path = self.path(bucket, key)
        with self.lock:
            if if_absent and path.is_file():
                raise Refused(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.root / f".{uuid.uuid4().hex}"
            aside.write_bytes(content)
            aside.rename(path)
        return f'"{hashlib.md5(content).hexdigest()}"'


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state = None

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def answer(self, status, body=b"", headers=(), whole=True):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name == "Content-Length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if whole else body[: len(body) // 2])
        if not whole:
            self.close_connection = True

    def answer_refused(self, error):
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{error.code}</Code><Message>{error.message}</Message></Error>'
        self.answer(error.status, body.encode())

    def check_signature(self, content):
        """Calculates the signature of version 4 anew."""
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]+)/s3/aws4_request, SignedHeaders=([^,]+), Signature=(\w+)",
            self.headers.get("Authorization", ""),
        )
        if not found or found[1] != "test":
            raise Refused(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
        _, day, region, names, signature = found.groups()
        digest = self.headers["x-amz-content-sha256"]
        if digest != hashlib.sha256(content).hexdigest() and digest != "UNSIGNED-PAYLOAD":
            raise Refused(400, "XAmzContentSHA256Mismatch")
        parts = urlsplit(self.path)
        query = "&".join(sorted(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in parse_qsl(parts.query, keep_blank_values=True)))
        headers = "".join(f"{name}:{' '.join(self.headers[name].split())}\n" for name in names.split(";"))
        request = "\n".join([self.command, quote(unquote(parts.path), safe="/-_.~"), query, headers, names, digest])
        scope = f"{day}/{region}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", self.headers["x-amz-date"], scope, hashlib.sha256(request.encode()).hexdigest()])
        key = b"AWS4secret"
        for word in [day, region, "s3", "aws4_request", text]:
            key = hmac.new(key, word.encode(), hashlib.sha256).digest()
        if key.hex() != signature:
            raise Refused(403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided.")

    def serve(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        state = self.state
        parts = urlsplit(self.path)
        if parts.path == "/_state":
            with state.lock:
                body = {"uploads": len(state.uploads), **state.counts}
            return self.answer(200, json.dumps(body).encode())
        if parts.path == "/_faults":
            state.percent = int(content)
            return self.answer(200)
        fault = state.fault()
        if fault == "closed before":
            self.close_connection = True
            return None
        if fault == "before":
            return self.answer_refused(Refused(500, "InternalError", "We encountered an internal error. Please try again."))
        try:
            self.check_signature(content)
            bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
            if not (state.root / bucket).is_dir():
                raise Refused(404, "NoSuchBucket", "The specified bucket does not exist")
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            kind = "object" if key else "bucket"
            for name in ["uploads", "uploadId"]:
                kind = "upload" if name in query else kind
            with state.lock:
                state.counts[f"{self.command} {kind}"] += 1
            status, body, headers = getattr(self, f"{self.command.lower()}_{kind}")(bucket, key, query, content)
        except Refused as error:
            return self.answer_refused(error)
        if fault == "after":
            return self.answer_refused(Refused(503, "SlowDown", "Please reduce your request rate."))
        if fault == "closed after":
            self.close_connection = True
            return None
        return self.answer(status, body, headers, whole=fault != "broken off" or len(body) < 2)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def get_bucket(self, bucket, _, query, __):
        root = self.state.root / bucket
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        entries = {}
        for key in keys:
            if key.startswith(prefix):
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    entries[prefix + rest.split(delimiter)[0] + delimiter] = None
                else:
                    entries[key] = root / key
        after = query.get("continuation-token") or query.get("start-after") or ""
        left = [name for name in sorted(entries) if name > after]
        page, is_truncated = left[:PAGE], len(left) > PAGE
        text = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount><IsTruncated>{str(is_truncated).lower()}</IsTruncated>"
        for name in page:
            path = entries[name]
            if path is None:
                text += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
                continue
            # It may be gone by now.
            try:
                content, time = path.read_bytes(), path.stat().st_mtime
            except FileNotFoundError:
                continue
            modified = datetime.datetime.fromtimestamp(time, datetime.timezone.utc)
            text += f"<Contents><Key>{escape(name)}</Key><LastModified>{modified:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
            text += f'<ETag>"{hashlib.md5(content).hexdigest()}"</ETag><Size>{len(content)}</Size></Contents>'
        if is_truncated:
            text += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        return 200, f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>{text}</ListBucketResult>'.encode(), []

    def get_object(self, bucket, key, _, __):
        path = self.state.path(bucket, key)
        try:
            content, time = path.read_bytes(), path.stat().st_mtime
        except OSError:
            raise Refused(404, "NoSuchKey", "The specified key does not exist.") from None
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Match", etag) != etag:
            raise Refused(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
        headers = [("ETag", etag), ("Last-Modified", formatdate(time, usegmt=True))]
        if self.command == "HEAD":
            return 200, b"", [*headers, ("Content-Length", str(len(content)))]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            return 206, content[first : last + 1], [*headers, ("Content-Range", f"bytes {first}-{last}/{len(content)}")]
        return 200, content, headers

    head_object = get_object

    def is_conditional(self):
        condition = self.headers.get("If-None-Match")
        if condition and not self.state.has_conditions:
            raise Refused(501, "NotImplemented", "A header you provided implies functionality that is not implemented")
        return condition == "*"

    def put_object(self, bucket, key, _, content):
        return 200, b"", [("ETag", self.state.write(bucket, key, content, self.is_conditional()))]

    def delete_object(self, bucket, key, _, __):
        self.state.path(bucket, key).unlink(missing_ok=True)
        return 204, b"", []

    def upload(self, bucket, key, query):
        upload = self.state.uploads.get(query["uploadId"])
        if not upload or upload[0] != (bucket, key):
            raise Refused(404, "NoSuchUpload", "The specified multipart upload does not exist.")
        return upload[1]

    def post_upload(self, bucket, key, query, content):
        state = self.state
        if "uploads" in query:
            upload = uuid.uuid4().hex
            with state.lock:
                state.uploads[upload] = ((bucket, key), {})
            text = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
            return 200, f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>".encode(), []
        parts = self.upload(bucket, key, query)
        listed = re.findall(r"<Part>.*?</Part>", content.decode(), re.S)
        number = lambda part: int(re.search(r"<PartNumber>(\d+)<", part)[1])
        etag = lambda part: re.search(r"<ETag>(.*?)<", part)[1].replace("&quot;", '"')
        if [number(part) for part in listed] != list(range(1, len(listed) + 1)):
            raise Refused(400, "InvalidPartOrder")
        whole = []
        for part in listed:
            found = parts.get(number(part))
            if found is None or f'"{hashlib.md5(found).hexdigest()}"' != etag(part):
                raise Refused(400, "InvalidPart")
            whole.append(found)
        if any(len(part) < SMALLEST_PART or len(part) != len(whole[0]) for part in whole[:-1]):
            raise Refused(400, "EntityTooSmall")
        tag = state.write(bucket, key, b"".join(whole), self.is_conditional())
        with state.lock:
            state.uploads.pop(query["uploadId"], None)
        text = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><ETag>{escape(tag)}</ETag>"
        return 200, f"<CompleteMultipartUploadResult>{text}</CompleteMultipartUploadResult>".encode(), []

    def put_upload(self, bucket, key, query, content):
        self.upload(bucket, key, query)[int(query["partNumber"])] = content
        return 200, b"", [("ETag", f'"{hashlib.md5(content).hexdigest()}"')]

    def delete_upload(self, bucket, key, query, _):
        self.upload(bucket, key, query)
        with self.state.lock:
            self.state.uploads.pop(query["uploadId"], None)
        return 204, b"", []


def main():
    root, *flags = sys.argv[1:]
    seed = int(flags[flags.index("--faults") + 1]) if "--faults" in flags else None
    Handler.state = State(root, seed, "--no-conditions" not in flags)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
