"""Library calls that may take long: their cancellation, their callbacks, and the thread on which they run.

# Design

Python runs signal handlers on the main thread, between two bytecode instructions: never while that thread is in the
library. A call of the main thread is therefore made on a worker thread, while the main thread waits in a way that lets
signal handlers run. If a handler raises, as that of Ctrl-C does, the call is cancelled, and the exception is raised
when the call has ended. Callbacks still run on the calling thread. Calls of other threads are made directly.

A native thread must not return into an interpreter that is shutting down. All running calls are therefore registered,
and are stopped and waited for at exit.
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
"""Seconds between two checks of a waiting thread for interruptions without a signal, such as _thread.interrupt_main."""

PARTING = 5.0
"""Seconds that interpreter shutdown waits for stopped calls, and then again for interrupted callbacks."""

_running: set[Call] = set()
_ended = threading.Condition()
_idle: list[_Worker] = []
_engines: weakref.WeakSet[Any] = weakref.WeakSet()
_is_ending = False
_has_threads = False
"""Whether a model was opened, so that ONNX Runtime has threads."""


class Job:
    """Work on another thread, and the messages of that thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._result: Any = None
        self._error: BaseException | None = None
        self._process = os.getpid()
        self.is_done = False

    def start(self) -> None:
        """Starts on an idle worker thread, or a new one."""
        if _is_ending:
            raise RuntimeError("the interpreter is shutting down: no call can start on another thread")
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
            worker.start()
        worker.jobs.put(self)

    def start_aside(self) -> bool:
        """Starts if this is the main thread and threads can be started; returns whether it did."""
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
        del self._work  # Its references may hold large objects.
        _idle.append(worker)
        self.is_done = True
        self._inbox.put(None)

    def tell(self, what: Any) -> None:
        """Sends a message, which is not None, to the waiting thread."""
        self._inbox.put(what)

    def next(self) -> Any:
        """Waits for the next message; None at the end."""
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
            why = "it was started in the parent before a fork, or the interpreter is shutting down"
            raise Error(C.constants["T5G_ERROR_CLOSED"], f"the call has no result: {why}")
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error


class _Worker(threading.Thread):
    """A daemon thread that runs jobs. Between jobs it waits in a queue, which does not block interpreter shutdown."""

    def __init__(self) -> None:
        super().__init__(name="t5gemma-call", daemon=True)
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            self.jobs.get().run(self)


def is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def unstoppable(work: Callable[[], T]) -> T:
    """Runs work that cannot be cancelled, such as opening a model; if a signal handler raises, it continues."""
    global _has_threads
    _has_threads = True
    job = Job(work)
    if not job.start_aside():
        return work()
    while job.next() is not None:
        pass
    return job.result()


class Cancellation(Owner):
    """Cancels the calls that it was passed to, from any thread. It cannot be reset."""

    _name = "cancellation"

    def __init__(self) -> None:
        super().__init__(Handle(call(C.t5g_cancellation_new), C.t5g_cancellation_free))
        # The library stops requests of an engine. Every other call has a cancellation of its own, for interruptions.
        self._calls: set[Call] = set()

    def cancel(self) -> None:
        call(C.t5g_cancellation_cancel, self._handle, out=False)
        for one in list(self._calls):
            one.stop()

    @property
    def is_cancelled(self) -> bool:
        return C.t5g_cancellation_is_cancelled(self._handle) == 1


def checked(cancellation: Any) -> Cancellation:
    """Checks that a cancellation is open and not yet cancelled."""
    if not isinstance(cancellation, Cancellation):
        raise TypeError(f"cancellation: expected a Cancellation, found {_forms.shown(cancellation)}")
    if cancellation.is_cancelled:
        raise Error(C.constants["T5G_ERROR_CANCELLED"], "cancelled")
    return cancellation


class Call:
    """A t5g_call, and the exception raised by one of its callbacks or by the waiting thread."""

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
        """Runs work with the t5g_call; on the main thread it can be interrupted."""
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
                # A second interruption abandons the call.
                if self._raised is not None or job.is_done:
                    raise
                self._fail(error)

    def run_here(self, work: Callable[[Any], T]) -> T:
        """Runs the work on this thread."""
        self._begin()
        return self._ended_well(lambda: self._do(work))

    def stop(self) -> None:
        """Cancels the call if it is running. Any thread may call it."""
        own = self._own
        if own is None or own.number is None:
            return
        try:
            call(C.t5g_cancellation_cancel, own.number, out=False)
        except Error:
            pass  # The call has ended.

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

    # Callbacks run on the calling thread. After an exception, none is called any more.

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
        except BaseException as error:  # raised again by the call
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
            # Copied, because the library's memory is invalid after this returns and the caller may keep the array.
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
            # They have to stay alive until the next call.
            self._allowed = np.empty(0, np.int64) if tokens is None else tokens
            ctypes.c_void_p.from_address(allowed).value = self._allowed.ctypes.data
            return self._allowed.size

        self._set("prefix_allowed_tokens", allow)


def seconds_left(deadline: float | None) -> float:
    """A deadline in the library's form: 0 is none, a negative number has passed."""
    if deadline is None:
        return 0.0
    left = _forms.seconds("deadline", deadline)
    return left if left > 0 else -1.0


def copied(pointer: int | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A copy of an array of the library."""
    array = np.empty(shape, dtype)
    if array.size:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
    return array


# Interpreter shutdown and forks


def end_with_the_interpreter() -> None:
    """Ends this thread silently, as Python ends daemon threads, if another thread is shutting the interpreter down."""
    if _is_ending and not is_main():
        raise SystemExit


def shut_down_at_the_end(engine: Any) -> None:
    """Registers an engine to be shut down before the interpreter ends."""
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
            pass  # The engine is closed.
    _wait_for_calls()
    # The calls that are left are in callbacks that do not return.
    for one in list(_running):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(one.thread), ctypes.py_object(SystemExit))
    _wait_for_calls()


def _wait_for_calls() -> None:
    until = time.monotonic() + PARTING
    with _ended:
        while _running and (left := until - time.monotonic()) > 0:
            _ended.wait(left)


def _forget() -> None:
    """Resets the state in the child of a fork, which has none of the parent's threads."""
    global _ended
    _ended = threading.Condition()
    Handle.age += bool(_running or _engines)
    _running.clear()
    _idle.clear()
    _engines.clear()
    # When the child exits, ONNX Runtime's destructors would wait forever for threads of the parent, so they are
    # skipped. Python's own streams are flushed by then; C's are closed here. Handlers run in reverse order.
    if _has_threads and all(hasattr(_libc, name) for name in ("on_exit", "__cxa_atexit", "fcloseall")):
        _libc.on_exit(ctypes.cast(_libc._exit, ctypes.c_void_p), None)
        _libc.__cxa_atexit(ctypes.cast(_libc.fcloseall, ctypes.c_void_p), None, None)


if hasattr(os, "register_at_fork"):
    _libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=_forget)
