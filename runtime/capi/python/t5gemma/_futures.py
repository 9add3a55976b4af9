"""Futures of an engine's requests, which need no thread each: the engine's threads put ended requests into a queue, and
one thread of this module sets the results.

# Design

The engine's threads must not wait long for the interpreter, so their callback only puts numbers into a queue; copying
the result and running callbacks of futures is left to the other thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import queue
import threading
from concurrent import futures
from typing import Any, Callable, Generator

from ._library import C, Error, Handle, Owner, call, failure
from ._results import Hypothesis, result, taken

_numbers = itertools.count(1)
_pending: dict[int, Future] = {}
_ended: queue.SimpleQueue[tuple[int, int | None, int | None]] = queue.SimpleQueue()
_starting = threading.Lock()
_process = 0
"""The process that has the thread."""


class Future(futures.Future):
    """The result of a request of an engine: what Model.generate returns. With asyncio it can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self._stop = Handle(call(C.t5g_cancellation_new), C.t5g_cancellation_free)

    def __await__(self) -> Generator[Any, None, list[list[Hypothesis]]]:
        self._check()
        return asyncio.wrap_future(self).__await__()

    def cancel(self) -> bool:
        """Cancels the request, unless it has ended."""
        is_cancelled = super().cancel()
        if is_cancelled and self._stop.number is not None and self._stop.is_of_this_process:
            call(C.t5g_cancellation_cancel, self._stop.number, out=False)
        return is_cancelled

    def result(self, timeout: float | None = None) -> list[list[Hypothesis]]:
        """Waits for the end and returns what Model.generate returns."""
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits for the end and returns the exception that `result` raises, if any."""
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        # Whether it had ended at the fork cannot be asked: its lock may be held forever in the child.
        self._stop.check_process("future", self)

    __reduce__ = Owner.__reduce__


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
def _done(number: int, result: int | None, error: int | None) -> None:
    _ended.put((number, result, error))


def future(way: ctypes.Structure, submit: Callable[[Any, Any], None]) -> Future:
    """Submits a request with a t5g_call and the function that receives its end."""
    _start()
    made, number = Future(), next(_numbers)
    way.user, way.cancellation = number, made._stop.number
    _pending[number] = made
    try:
        submit(ctypes.byref(way), ctypes.cast(_done, ctypes.c_void_p))
    except BaseException:
        del _pending[number]
        raise
    return made


def _start() -> None:
    global _process
    with _starting:
        if _process != os.getpid():
            threading.Thread(target=_deliver, name="t5gemma-futures", daemon=True).start()
            _process = os.getpid()


def _deliver() -> None:
    while True:
        number, found, error = _ended.get()
        made = _pending.pop(number, None)
        outcome: Any = failure(error) if error else None
        try:
            rows = taken(result(found)) if found else None
        except Error as wrong:
            outcome = wrong
        if made is None or not made.set_running_or_notify_cancel():
            continue
        if outcome is not None:
            made.set_exception(outcome)
        else:
            made.set_result(rows)


def _forget() -> None:
    """Resets the state in the child of a fork, in which requests of the parent do not end."""
    global _starting, _ended
    _starting, _ended = threading.Lock(), queue.SimpleQueue()
    _pending.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
