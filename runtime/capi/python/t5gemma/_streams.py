"""Streams of an engine's requests for asyncio: the engine's threads wake the event loop, and no thread waits.

# Design

Callbacks on the engine's threads hold up the rows in flight, so they only append to an inbox and wake its event loop, once
for all inboxes that the loop has not looked at. A reader takes all text that has come as one piece: a slow reader holds at
most the text of its target, and never delays the engine.
"""

from __future__ import annotations

import asyncio
import copy
import ctypes
import itertools
import os
import weakref
from collections import deque
from typing import Any, Callable

from ._library import C, Error, Handle, Owner, call, callback, failure, interrupt_again
from ._results import Hypothesis, result, rows_of, stats_of

_numbers = itertools.count(1)
_inboxes: dict[int, _Inbox] = {}
"""Of the requests that have not ended."""


class _Post:
    """What an engine's threads have for an event loop, which is woken once for all that it has not looked at."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._news: deque[_Inbox] = deque()
        self._is_woken = False

    def tell(self, inbox: _Inbox) -> bool:
        """Has the readers of an inbox look there; returns whether the loop is open."""
        self._news.append(inbox)
        loop = self._loop()
        if loop is None or loop.is_closed():
            return False
        if not self._is_woken:
            self._is_woken = True
            try:
                loop.call_soon_threadsafe(self._look)
            except RuntimeError:  # It was closed just now.
                return False
        return True

    def _look(self) -> None:
        self._is_woken = False
        while self._news:
            inbox = self._news.popleft()
            readers, inbox.readers = inbox.readers, []
            for reader in readers:
                if not reader.done():
                    reader.set_result(None)


_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = weakref.WeakKeyDictionary()


class _Inbox:
    """What an engine's threads have for a stream. It does not keep the stream alive."""

    __slots__ = ("end", "loop", "post", "readers", "texts")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.post = _posts.get(self.loop) or _posts.setdefault(self.loop, _Post(self.loop))
        self.texts: deque[str] = deque()
        self.end: Handle | Error | None = None
        self.readers: list[asyncio.Future[None]] = []


@callback("t5g_call", "on_piece")
def _piece(number: int, pointer: int) -> int:
    inbox = _inboxes.get(number)
    if inbox is None:
        return 1
    shown = C.structs["t5g_piece"].from_address(pointer)
    if not shown.text_size:
        return 0
    inbox.texts.append(ctypes.string_at(shown.text, shown.text_size).decode())
    return 0 if inbox.post.tell(inbox) else 1


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
def _done(number: int, found: int | None, error: int | None) -> None:
    end = failure(error) if error else result(found)
    inbox = _inboxes.pop(number, None)
    if inbox is not None:
        inbox.end = end
        inbox.post.tell(inbox)


class Stream:
    """The text of a request of an engine, as an asynchronous iterator over its pieces.

    Cancelling the task that waits for a piece cancels the request, and so does dropping or closing the stream, as leaving an
    `async for` over it does.
    """

    def __init__(self) -> None:
        self._inbox = _Inbox()
        self._stop = Handle(call(C.t5g_cancellation_new), C.t5g_cancellation_free)
        self._is_closed = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> str:
        inbox = self._own()
        while not inbox.texts and not self._is_closed:
            if inbox.end is None:
                await self._news()
            elif isinstance(inbox.end, Error):
                self._is_closed = True
                raise copy.copy(inbox.end)
            else:
                self._is_closed = True
        if self._is_closed and not inbox.texts:
            raise StopAsyncIteration
        # One by one, since the engine's threads add to them meanwhile.
        pieces = []
        while inbox.texts:
            pieces.append(inbox.texts.popleft())
        return "".join(pieces)

    def cancel(self) -> None:
        """Cancels the request, unless it has ended: who waits for it gets an Error. Any thread may call it."""
        if self._inbox.end is None and self._stop.is_of_this_process:
            call(C.t5g_cancellation_cancel, self._stop.number, out=False)

    async def aclose(self) -> None:
        """Cancels the request, unless it has ended, and ends the iteration."""
        self._is_closed = True
        self._inbox.texts.clear()
        self.cancel()

    async def result(self) -> list[list[Hypothesis]]:
        """Waits for the end and returns what Model.generate returns. The pieces can still be read."""
        return rows_of(await self._ended())

    async def stats(self) -> dict[str, float | int | None]:
        """Waits for the end and returns the same as Request.stats."""
        return stats_of(await self._ended())

    async def _ended(self) -> Handle:
        """The request's result."""
        inbox = self._own()
        while inbox.end is None:
            await self._news()
        if isinstance(inbox.end, Error):
            # A copy, because a traceback refers to this stream.
            raise copy.copy(inbox.end)
        return inbox.end

    async def _news(self) -> None:
        reader = self._inbox.loop.create_future()
        self._inbox.readers.append(reader)
        try:
            await reader
        except BaseException:
            self.cancel()
            raise

    def _own(self) -> _Inbox:
        self._stop.check_process("stream", self)
        if asyncio.get_running_loop() is not self._inbox.loop:
            raise RuntimeError("stream: expected the event loop that it was made in, found another one")
        return self._inbox

    __reduce__ = Owner.__reduce__

    def __del__(self) -> None:
        if getattr(self, "_stop", None) is not None:
            try:
                self.cancel()
            except KeyboardInterrupt:
                interrupt_again()


def stream(way: ctypes.Structure, submit: Callable[[Any, Any], None]) -> Stream:
    """Submits a request with a t5g_call and the function that receives its end."""
    made, number = Stream(), next(_numbers)
    way.user, way.cancellation, way.stream_text = number, made._stop.number, 1
    way.on_piece = ctypes.cast(_piece, ctypes.c_void_p)
    _inboxes[number] = made._inbox
    try:
        submit(ctypes.byref(way), ctypes.cast(_done, ctypes.c_void_p))
    except BaseException:
        del _inboxes[number]
        raise
    return made


def _forget() -> None:
    """Resets the state in the child of a fork, in which requests of the parent do not end."""
    _inboxes.clear()
    _posts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
