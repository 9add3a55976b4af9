"""Calls of the library that may take long: who stops them, which callbacks they are given, and on which thread they run.

# Design

Python runs signal handlers on its main thread, between two of its own instructions: never while that thread is in the library. A
call of the main thread's is therefore made on a thread of this module's, for which the main thread waits such that signals are
heard; if a handler raises, as that of Ctrl-C does, the call is cancelled, and the exception raised when it has ended. Callbacks
run on the thread that has made the call all the same. Calls of other threads are made where they are.

A native thread must not come back into an interpreter that is ending. So everything that runs is known, and is stopped and
waited for at exit.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import threading
import time
import weakref
from typing import Any, Callable, TypeVar

import numpy as np

from . import _forms
from ._library import C, Error, Handle, Owner, call, callback, filled

T = TypeVar("T")

PATIENCE = 0.1
"""Seconds after which a thread that waits looks around: for what comes without a signal, such as _thread.interrupt_main."""

PARTING = 5.0
"""Seconds that the interpreter's end waits for calls that have been stopped; then for callbacks that have been interrupted."""

_running: set[Call] = set()
_ended = threading.Condition()
_idle: list[_Worker] = []
_engines: weakref.WeakSet[Any] = weakref.WeakSet()
_is_ending = False
_has_threads = False
"""Whether something was opened, of which ONNX Runtime has threads."""


class Job:
    """Work on another thread, and what that thread has to say meanwhile."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._result: Any = None
        self._error: BaseException | None = None
        self._process = os.getpid()
        self.is_done = False

    def start(self) -> None:
        """Begins on a thread that has nothing to do, or a new one."""
        if _is_ending:
            raise RuntimeError("the interpreter is ending: no call begins on another thread")
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
            worker.start()
        worker.jobs.put(self)

    def start_aside(self) -> bool:
        """Begins if signals are handled on this thread, and there can be another: not at the interpreter's end."""
        if not is_main():
            return False
        try:
            self.start()
        except RuntimeError:
            return False
        return True

    def run(self, worker: _Worker) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # raised again by `result`
            self._error = error
        del self._work  # What it refers to may be large.
        _idle.append(worker)
        self.is_done = True
        self._inbox.put(None)

    def tell(self, what: Any) -> None:
        """Gives something, not None, to who waits."""
        self._inbox.put(what)

    def next(self) -> Any:
        """Waits for what is told next; None at the end."""
        while True:
            is_done = self.is_done
            try:
                return self._inbox.get(timeout=0 if is_done else PATIENCE)
            except queue.Empty:
                if is_done or _is_ending or self._process != os.getpid():
                    return None

    def result(self) -> Any:
        if not self.is_done:
            end_with_the_interpreter()
            why = "it began before a fork, in the parent, or the interpreter is ending"
            raise Error(C.constants["T5G_ERROR_CLOSED"], f"the call has no result: {why}")
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error


class _Worker(threading.Thread):
    """A thread that runs jobs. It ends with the process: between jobs it waits for nothing that an ending interpreter does."""

    def __init__(self) -> None:
        super().__init__(name="t5gemma-call", daemon=True)
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            self.jobs.get().run(self)


def is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def unstoppable(work: Callable[[], T]) -> T:
    """Opens or ends something, which nothing can stop: if a signal's handler raises, it is left to itself."""
    global _has_threads
    _has_threads = True
    job = Job(work)
    if not job.start_aside():
        return work()
    while job.next() is not None:
        pass
    return job.result()


class Cancellation(Owner):
    """Stops the calls that it is given to, from any thread, once and for all."""

    _name = "cancellation"

    def __init__(self) -> None:
        super().__init__(Handle(call(C.t5g_cancellation_new), C.t5g_cancellation_free))
        # An engine's requests are stopped by the library. Calls have a cancellation of their own each, for interruptions.
        self._calls: set[Call] = set()

    def cancel(self) -> None:
        call(C.t5g_cancellation_cancel, self._handle, out=False)
        for one in list(self._calls):
            one.stop()

    @property
    def is_cancelled(self) -> bool:
        return C.t5g_cancellation_is_cancelled(self._handle) == 1


def checked(cancellation: Any) -> Cancellation:
    """A Cancellation that is open and has not been used."""
    if not isinstance(cancellation, Cancellation):
        raise TypeError(f"cancellation: expected a Cancellation, found {_forms.shown(cancellation)}")
    if cancellation.is_cancelled:
        raise Error(C.constants["T5G_ERROR_CANCELLED"], "cancelled")
    return cancellation


class Call:
    """A t5g_call, and the exception that one of its callbacks, or who waits for it, has raised."""

    def __init__(
        self,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
        on_piece: Callable[[int, int, str], bool | None] | None = None,
        logits_processor: Callable[[np.ndarray, np.ndarray], None] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Any] | None = None,
    ) -> None:
        self._raised: BaseException | None = None
        self._job: Job | None = None
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._own: Handle | None = None
        self.thread = 0
        self._cancellation = None if cancellation is None else checked(cancellation)
        self._given = filled("t5g_call", deadline_seconds=seconds_left(deadline))
        callbacks = (
            ("on_piece", on_piece),
            ("logits_processor", logits_processor),
            ("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn),
        )
        for name, function in callbacks:
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a function, found {_forms.shown(function)}")
        if on_piece is not None:
            self._show_pieces(on_piece)
        if logits_processor is not None:
            self._change_scores(logits_processor)
        if prefix_allowed_tokens_fn is not None:
            self._allow_tokens(prefix_allowed_tokens_fn)

    def run(self, work: Callable[[Any], T]) -> T:
        """Does work that is given the t5g_call, and can be interrupted if this is the main thread."""
        job = self._job = Job(lambda: self._do(work))
        try:
            self._begin()
            if not job.start_aside():
                self._job = None
        except BaseException as error:
            self._fail(error)
            self._end()
            raise
        if self._job is None:
            return self._ended_well(lambda: self._do(work))
        while True:
            try:
                while (asked := job.next()) is not None:
                    asked()
                return self._ended_well(job.result)
            except BaseException as error:
                # A second interruption leaves the call to itself.
                if self._raised is not None or job.is_done:
                    raise
                self._fail(error)

    def run_here(self, work: Callable[[Any], T]) -> T:
        """Does the work on this thread."""
        self._begin()
        return self._ended_well(lambda: self._do(work))

    def stop(self) -> None:
        """Ends the call as cancelled, from any thread, if it runs."""
        own = self._own
        if own is None or own.number is None:
            return
        try:
            call(C.t5g_cancellation_cancel, own.number, out=False)
        except Error:
            pass  # It has ended.

    def _begin(self) -> None:
        own = self._own = Handle(call(C.t5g_cancellation_new), C.t5g_cancellation_free)
        self._given.cancellation = own.number
        with _ended:
            end_with_the_interpreter()
            _running.add(self)
        if self._cancellation is not None:
            self._cancellation._calls.add(self)
            if self._cancellation.is_cancelled:
                self._end()
                raise Error(C.constants["T5G_ERROR_CANCELLED"], "cancelled")

    def _do(self, work: Callable[[Any], T]) -> T:
        self.thread = threading.get_ident()
        try:
            return work(ctypes.byref(self._given))
        finally:
            self._end()

    def _end(self) -> None:
        if self._cancellation is not None:
            self._cancellation._calls.discard(self)
        with _ended:
            self._own = None
            _running.discard(self)
            _ended.notify_all()

    def _ended_well(self, result: Callable[[], T]) -> T:
        try:
            given = result()
        except Error:
            end_with_the_interpreter()
            if self._raised is None:
                raise
        raised, self._raised = self._raised, None
        try:
            if raised is not None:
                raise raised
            return given
        finally:
            del raised

    # Callbacks. Each is asked on the thread that has made the call, and nothing is asked once something has been raised.

    def _fail(self, error: BaseException) -> None:
        self._raised = error
        self.stop()

    def _asked(self, work: Callable[[], T]) -> T | None:
        if self._job is None:
            return self._guarded(work)
        self._job.tell(lambda: self._answers.put(self._guarded(work)))
        while self._raised is None:
            try:
                return self._answers.get(timeout=PATIENCE)
            except queue.Empty:
                pass
        return None

    def _guarded(self, work: Callable[[], T]) -> T | None:
        if self._raised is not None:
            return None
        try:
            return work()
        except BaseException as error:  # raised again by the call that this belongs to
            self._fail(error)
            return None

    def _set(self, name: str, function: Callable[..., Any]) -> None:
        made = callback("t5g_call", name)(function)
        setattr(self, f"_{name}", made)
        setattr(self._given, name, ctypes.cast(made, ctypes.c_void_p))

    def _show_pieces(self, on_piece: Callable[[int, int, str], bool | None]) -> None:
        piece = C.structs["t5g_piece"]

        def show(_: int, pointer: int) -> int:
            shown = piece.from_address(pointer)
            row, token = shown.row, shown.token
            text = ctypes.string_at(shown.text, shown.text_size).decode() if shown.text else ""
            answer = self._asked(lambda: on_piece(row, token, text))
            return int(self._raised is not None or (_forms.is_bool(answer) and not answer))

        self._given.stream_text = 1
        self._set("on_piece", show)

    def _change_scores(self, logits_processor: Callable[[np.ndarray, np.ndarray], None]) -> None:
        position, size = C.structs["t5g_position"], ctypes.sizeof(ctypes.c_float)

        def change(_: int, pointer: int, scores: int, count: int) -> None:
            place = position.from_address(pointer)
            target = copied(place.target, (place.target_length,), np.int64)
            # The library's own are gone when this returns, and whoever keeps an array may look at it later.
            seen = copied(scores, (count,), np.float32)

            def work() -> bool:
                answer = logits_processor(target, seen)
                if answer is not None and answer is not seen:
                    expected = "the scores to be changed in place, and None or the same array returned"
                    raise TypeError(f"logits_processor: expected {expected}, found {_forms.shown(answer)}")
                return True

            if self._asked(work):
                ctypes.memmove(scores, seen.ctypes.data, count * size)

        self._set("logits_processor", change)

    def _allow_tokens(self, prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Any]) -> None:
        def allow(_: int, row: int, pointer: int, length: int, allowed: int) -> int:
            target = copied(pointer, (length,), np.int64)
            work = lambda: _forms.row("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn(row, target))  # noqa: E731
            tokens = self._asked(work)
            # They have to live until this is called again.
            self._allowed = np.empty(0, np.int64) if tokens is None else tokens
            ctypes.c_void_p.from_address(allowed).value = self._allowed.ctypes.data
            return self._allowed.size

        self._set("prefix_allowed_tokens", allow)


def seconds_left(deadline: float | None) -> float:
    """A deadline as the library takes it: 0 is none, and less one that has passed."""
    if deadline is None:
        return 0.0
    left = _forms.seconds("deadline", deadline)
    return left if left > 0 else -1.0


def copied(pointer: int | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of numbers of the library's."""
    array = np.empty(shape, dtype)
    if array.size:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
    return array


# The interpreter's end, and forks


def end_with_the_interpreter() -> None:
    """Ends this thread, without a word as Python ends daemon threads, if the interpreter is ending on another."""
    if _is_ending and not is_main():
        raise SystemExit


def shut_down_at_the_end(engine: Any) -> None:
    """Has an engine shut down before the interpreter ends."""
    _engines.add(engine)


@atexit.register
def _part() -> None:
    global _is_ending
    with _ended:
        _is_ending = True
        running = list(_running)
    for one in running:
        one.stop()
    for engine in list(_engines):
        try:
            engine.shutdown()
        except Error:
            pass  # It is closed.
    _wait_for_calls()
    # What is left is in callbacks that do not come to an end.
    for one in list(_running):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(one.thread), ctypes.py_object(SystemExit))
    _wait_for_calls()


def _wait_for_calls() -> None:
    until = time.monotonic() + PARTING
    with _ended:
        while _running and (left := until - time.monotonic()) > 0:
            _ended.wait(left)


def _forget() -> None:
    """In the child of a fork, which has none of the parent's threads."""
    global _ended
    _ended = threading.Condition()
    Handle.age += bool(_running or _engines)
    _running.clear()
    _idle.clear()
    _engines.clear()
    # At the child's end ONNX Runtime's destructors would wait for ever for threads that are in the parent, so they are left
    # out. Python's own streams are written by then; C's are closed here. Handlers run in reverse order.
    if _has_threads and all(hasattr(_libc, name) for name in ("on_exit", "__cxa_atexit", "fcloseall")):
        _libc.on_exit(ctypes.cast(_libc._exit, ctypes.c_void_p), None)
        _libc.__cxa_atexit(ctypes.cast(_libc.fcloseall, ctypes.c_void_p), None, None)


if hasattr(os, "register_at_fork"):
    _libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=_forget)
