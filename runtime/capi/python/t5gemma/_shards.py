"""Shards of documents, each computed by the program `t5gemma batch`.

# Design

The program `t5gemma batch` makes sure that each shard is computed once and published whole. A scheduler may start a shard twice, lose
its worker, or run it beside a worker that it believes dead. So this module keeps no record of finished shards: run the same shards
again to compute those that are missing.
"""

from __future__ import annotations

import collections
import ctypes
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Mapping, Sequence, Union

from . import _forms

Path = Union[str, "os.PathLike[str]"]

VARIABLE = "T5GEMMA_PROGRAM"
REFUSED, TERMINATED = 2, 130
"""Exit statuses of the program; 0 is success, and with others another run may succeed."""
SAID = 20
"""The last lines of a program's stderr that a message has."""


class ProgramNotFound(Exception):
    """The program t5gemma is not where it was looked for."""


class ProgramKilled(Exception):
    """The program was ended by a signal: another attempt may succeed."""


class ArgumentsRefused(ValueError):
    """The program does not take its arguments, or the output folder was begun with others: every shard would fail."""


@dataclass(frozen=True)
class Shard:
    """What has become of a shard."""

    input: str
    output: str
    is_done: bool
    message: str = ""
    """What the program has said: why it failed."""
    counts: Mapping[str, Any] = field(default_factory=dict)
    """The program's summary: rows, errors, tokens and seconds; `skipped` is 1 if the output was there."""
    seconds: float = 0.0
    """Of the last attempt, the program's start included."""
    node: str = ""
    """The name of the machine that has computed it."""


@dataclass
class Report:
    """What has become of all shards, in the order of the inputs."""

    shards: list[Shard] = field(default_factory=list)

    @property
    def done(self) -> list[Shard]:
        return [shard for shard in self.shards if shard.is_done]

    @property
    def failed(self) -> list[Shard]:
        return [shard for shard in self.shards if not shard.is_done]

    def __str__(self) -> str:
        lines = [f"{len(self.done)} of {len(self.shards)} shards are done"]
        lines += [f"{shard.input}: {shard.message}" for shard in self.failed]
        return "\n".join(lines)


def place(name: str, path: Any) -> str:
    """An absolute path, or the address of an object store as it is."""
    given = _forms.path(name, path).decode()
    return given if "://" in given else os.path.abspath(given)


def shards(inputs: Any, output: str) -> list[Shard]:
    """The shards to compute: of a glob pattern, or of paths."""
    if isinstance(inputs, (str, os.PathLike)):
        pattern = place("inputs", inputs)
        if "://" in pattern and glob.has_magic(pattern):
            raise ValueError(f"inputs: expected the URLs of objects (patterns are for files), found {pattern}")
        found = sorted(glob.glob(pattern)) if "://" not in pattern else [pattern]
        if not found:
            raise ValueError(f"inputs: expected files, found none that match {pattern}")
    else:
        found = [place(f"inputs[{at}]", path) for at, path in enumerate(inputs)]
        if not found:
            raise ValueError("inputs: expected at least one file, found none")
    of_name: dict[str, str] = {}
    for path in found:
        name = os.path.basename(path)
        if name in of_name:
            raise ValueError(f"inputs: expected files of different names, found {of_name[name]} and {path}")
        of_name[name] = path
    return [Shard(path, os.path.join(output, name), False) for name, path in of_name.items()]


def threads(num_cpus: float, arguments: Sequence[str]) -> list[str]:
    """The argument for as many threads as CPUs, if there is none yet."""
    is_given = any(argument.split("=")[0] == "--threads" for argument in arguments)
    return [] if is_given else ["--threads", str(max(1, int(num_cpus)))]


def compute(named: str | None, given: Sequence[str], shard: Shard) -> Shard:
    """Runs the program for one shard."""
    model, *arguments = given
    command = [_program(named), "batch", model, "--input", shard.input, "--output", os.path.dirname(shard.output), *arguments]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            preexec_fn=_end_with(os.getpid()),
        ) as process:
            said = "".join(collections.deque(process.stderr or [], SAID)).strip()
        printed.seek(0)
        summary = printed.read()
    status, seconds = process.returncode, time.monotonic() - began
    if status < 0 or status == TERMINATED:
        signals = {number.value: number.name for number in signal.Signals}
        by = "a request to end" if status == TERMINATED else signals.get(-status, f"signal {-status}")
        raise ProgramKilled(f"{command[0]} batch was ended by {by}" + (f"; it said: {said}" if said else ""))
    if status == REFUSED:
        raise ArgumentsRefused(said)
    if status == 0:
        return replace(shard, is_done=True, message=said, counts=json.loads(summary), seconds=seconds, node=socket.gethostname())
    message = said or f"{command[0]} batch ended with exit status {status}"
    return replace(shard, message=message, seconds=seconds, node=socket.gethostname())


def _program(named: str | None) -> str:
    place = named or os.environ.get(VARIABLE)
    found = shutil.which(place or "t5gemma")
    if found is None:
        looked = f"at {place}" if place else f"in PATH, and {VARIABLE} is not set"
        raise ProgramNotFound(f"expected the program t5gemma, found none {looked} on {socket.gethostname()}")
    return found


_libc = ctypes.CDLL(None)


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a child does to end with its parent, as Ray ends workers without asking: two programs at one shard are a waste."""
    if not hasattr(_libc, "prctl"):
        return None

    def work() -> None:
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return work
