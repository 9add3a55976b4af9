#!/usr/bin/env python3
"""Runs a command beside a server: `with_server.py T5GEMMA MODEL -- COMMAND…`, with ADDRESS and PID in the command. The model is served as
`demo`; at the end the server has to end well."""

import signal
import subprocess
import sys


def main():
    program, model, dashes, *command = sys.argv[1:]
    assert dashes == "--", sys.argv
    server = subprocess.Popen([program, "serve", "--model", f"demo={model}", "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        address = None
        for line in server.stderr:
            if "listening on" in line:
                address = line.rsplit("/", 1)[1].strip()
            if line.strip().endswith("ready"):
                break
        assert address, "the server does not start"
        words = {"ADDRESS": address, "PID": str(server.pid)}
        done = subprocess.run([words.get(word, word) for word in command])
    finally:
        server.send_signal(signal.SIGTERM)
    rest = server.communicate(timeout=60)[1]
    if server.returncode:
        sys.exit(f"the server has ended with {server.returncode}: {rest}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
