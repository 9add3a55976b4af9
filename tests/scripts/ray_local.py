"""A Ray of one machine for the tests: offline, on the loopback alone, with its files in a folder of its own."""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
import tempfile

# Before Ray is imported.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0", RAY_SERVE_LOG_TO_STDERR="0")


def leave_the_network():
    """A network namespace of this process, with nothing but a loopback: Ray listens on all interfaces, whatever it is told."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET
        print(f"not in a network namespace: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        # SIOCSIFFLAGS with IFF_UP | IFF_RUNNING.
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
    # Nobody else can connect, and no token is left in the home folder.
    os.environ["RAY_AUTH_MODE"] = "disabled"


@contextlib.contextmanager
def cluster(cpus):
    """Ray with so many CPUs; what it runs finds this folder's modules and the package."""
    import ray

    # Short, because paths of sockets are.
    with tempfile.TemporaryDirectory(prefix="t5ray", dir="/tmp") as folder:
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=128 << 20,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
            logging_level="warning",
            log_to_driver=False,
        )
        try:
            yield
        finally:
            ray.shutdown()
