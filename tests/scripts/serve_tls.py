#!/usr/bin/env python3
"""Asks `t5gemma serve` through TLS: `serve_tls.py HOST:PORT CERTIFICATE`, where CERTIFICATE is the one that it must have and the model is
`demo`. Prints the names of the protocols that worked."""

import json
import socket
import ssl
import sys


def main():
    address, certificate = sys.argv[1:]
    host, port = address.split(":")
    chosen = []
    for offered in (["http/1.1"], ["h2", "http/1.1"], []):
        context = ssl.create_default_context(cafile=certificate)
        if offered:
            context.set_alpn_protocols(offered)
        with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as stream:
            chosen.append(stream.selected_alpn_protocol() or "none")
            if chosen[-1] != "h2":
                body = json.dumps({"inputs": "a"}).encode()
                stream.sendall(b"POST /generate HTTP/1.0\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                answer = b""
                while piece := stream.recv(1 << 16):
                    answer += piece
                assert answer.startswith(b"HTTP/1.0 200"), answer
    old = ssl.create_default_context(cafile=certificate)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port))) as plain, old.wrap_socket(plain, server_hostname=host) as stream:
        chosen.append(stream.version())

    import grpc

    with open(certificate, "rb") as file, grpc.secure_channel(address, grpc.ssl_channel_credentials(file.read())) as channel:
        # HealthCheckResponse with the status SERVING.
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == b"\x08\x01"
        chosen.append("gRPC")
    with socket.create_connection((host, int(port))) as plain:
        plain.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        answer = plain.recv(100)
        assert b"HTTP" not in answer, answer
    print(", ".join(chosen))


if __name__ == "__main__":
    main()
