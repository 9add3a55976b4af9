"""Runs `t5gemma batch` from and into moto's server for S3: outputs have the bytes of files, also
if three workers compute them. `object_store_moto.py T5GEMMA MODEL DOCUMENTS.parquet`

The tests have a stand-in of their own (object_store.py), which starts faster and fails on demand; this one is others' reading of S3.
"""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import boto3
from moto.server import ThreadedMotoServer


def main():
    program, model, documents = sys.argv[1:]
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    os.environ.update(settings, AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=address, AWS_ALLOW_HTTP="true")
    s3 = boto3.client("s3", endpoint_url=address)
    s3.create_bucket(Bucket="data")

    def start(inputs, output):
        words = [program, "batch", model, "--input", inputs, "--output", output, "--text-column", "body", "--max-new-tokens", "9"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(process):
        out, err = process.communicate()
        assert process.returncode == 0, err
        return json.loads(out)

    with tempfile.TemporaryDirectory() as scratch:
        inputs, output = pathlib.Path(scratch, "in"), pathlib.Path(scratch, "out")
        inputs.mkdir()
        (inputs / "a.jsonl").write_text("".join(json.dumps({"id": n, "body": f"Room {n} is free."}) + "\n" for n in range(20)))
        # Its output has three parts.
        padding = "x" * (1 << 20)
        (inputs / "large [1].jsonl").write_text("".join(json.dumps({"id": n, "body": 5, "padding": padding}) + "\n" for n in range(40)))
        shutil.copy(documents, inputs / "c.parquet")
        end(start(f"{inputs}/*", str(output)))
        for path in inputs.iterdir():
            s3.upload_file(str(path), "data", f"in/{path.name}")
        summaries = [end(process) for process in [start("s3://data/in/*", "s3://data/out") for _ in range(3)]]
        # moto knows conditions of puts, and not of what completes the third shard's upload.
        written = sum(found["written"] for found in summaries)
        assert 3 <= written <= 5 and written + sum(found["skipped"] for found in summaries) == 9, summaries
        for path in inputs.iterdir():
            found = s3.get_object(Bucket="data", Key=f"out/{path.name}")["Body"].read()
            assert found == (output / path.name).read_bytes(), path.name
        assert not s3.list_multipart_uploads(Bucket="data").get("Uploads")
        assert end(start("s3://data/in/*", "s3://data/out"))["skipped"] == 3
    server.stop()
    print("3 shards by 3 workers: the bytes of files")


if __name__ == "__main__":
    main()
