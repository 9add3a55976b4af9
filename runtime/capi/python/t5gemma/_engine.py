"""Engines, which generate for many requests at once, and their requests."""

from __future__ import annotations

import ctypes
import threading
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from . import _calls, _forms
from ._calls import Cancellation
from ._futures import Future, future
from ._images import Images
from ._library import C, Handle, Owner, call, filled
from ._model import Model, generation_options
from ._results import Hypothesis, result, stats_of, taken
from ._sources import Given, Ids, Sources
from ._streams import Stream, stream


class Request(Owner):
    """A request submitted to an engine. Freeing it cancels it. Threads may share its result; one may iterate over it."""

    _name = "request"
    _after_fork = "refused"

    def __init__(self, handle: Handle) -> None:
        super().__init__(handle)
        self._waiting = threading.Lock()

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """Row, token (-1 with the last text of a row) and text as they become final."""
        event, kinds = filled("t5g_event"), C.constants
        while True:
            call(C.t5g_request_poll, self._handle, _calls.PATIENCE, ctypes.byref(event), out=False)
            if event.kind == kinds["T5G_EVENT_PIECE"]:
                text = ctypes.string_at(event.text, event.text_size).decode() if event.text else ""
                yield event.row, event.token, text
            elif event.kind == kinds["T5G_EVENT_END"]:
                return

    def cancel(self) -> None:
        """Cancels the request. Any thread may call it."""
        call(C.t5g_request_cancel, self._handle, out=False)

    def result(self) -> list[list[Hypothesis]]:
        """Waits for the end and returns what Model.generate returns."""
        self._check()
        with self._waiting:
            for _ in self:
                pass
            return taken(result(call(C.t5g_request_result, self._handle)))

    def stats(self) -> dict[str, float | int | None]:
        """Waits for the end and returns the request's times in seconds since its submission, and its token counts."""
        self._check()
        with self._waiting:
            for _ in self:
                pass
            return stats_of(result(call(C.t5g_request_result, self._handle)))


SOURCES = (
    "sources",
    "attention_mask",
    "decoder_input_ids",
    "decoder_text",
    "progress_total",
    "images",
    "pixel_values",
    "pan_and_scan",
)
"""The arguments that make up the sources of a request."""

PRIORITIES = {name: C.constants[f"T5G_PRIORITY_{name.upper()}"] for name in ("high", "normal", "low")}


class Engine(Owner):
    """Continuous batching: generates for many requests at once. Any number of threads may submit requests.

    `devices` are the numbers of the GPUs to compute on, each with a copy of the model, which share one queue. On its
    own device, the model itself is used; copies are opened with its options. `max_rows` and `max_bytes` are limits for
    each device.
    """

    _name = "engine"
    _after_fork = "refused"

    def __init__(
        self,
        model: Model,
        *,
        max_rows: int | None = None,
        max_bytes: int | None = None,
        max_waiting: int | None = None,
        max_waiting_rows: int | None = None,
        max_waiting_tokens: int | None = None,
        max_waiting_bytes: int | None = None,
        devices: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model: expected a Model, found {_forms.shown(model)}")
        bounds = {
            "max_rows": max_rows,
            "max_bytes": max_bytes,
            "max_waiting": max_waiting,
            "max_waiting_rows": max_waiting_rows,
            "max_waiting_tokens": max_waiting_tokens,
            "max_waiting_bytes": max_waiting_bytes,
        }
        given = filled(
            "t5g_engine_options",
            **{name: _forms.whole(name, value, 1) for name, value in bounds.items() if value is not None},
        )
        if devices is not None:
            numbers = _forms.row("devices", devices)
            if not numbers.size:
                raise ValueError("devices: expected at least one, found none")
            given.devices, given.device_count = numbers.ctypes.data, numbers.size
        # Cached, because the engine reads sources with it and may outlive the model.
        self._model, of_model = model, model._handle
        _ = model._facts
        make = lambda: call(C.t5g_engine_new, of_model, ctypes.byref(given))  # noqa: E731
        super().__init__(_calls.unstoppable(lambda: Handle(make(), C.t5g_engine_free)))
        _calls.shut_down_at_the_end(self)

    def submit(
        self,
        sources: Sources,
        *,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_text: str | Sequence[str] | None = None,
        progress_total: int | Sequence[int] | None = None,
        stream_text: bool = False,
        priority: str = "normal",
        tenant: str | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> Request:
        """Submits sources in the forms of Model.generate. `deadline` counts from now, waiting included.

        While requests wait, those of `priority` "high" are admitted before "normal" and "low" ones, which get fewer
        turns, and each `tenant` gets an equal share, however many requests it submits.
        """
        given = self._given(locals())
        way = self._way(deadline, priority, tenant, stream_text=_forms.flag("stream_text", stream_text))
        if cancellation is not None:
            way.cancellation = _calls.checked(cancellation)._handle
        request = call(C.t5g_engine_submit, self._handle, given.pointer, generation_options(options), ctypes.byref(way))
        return Request(Handle(request, C.t5g_request_free))

    def future(
        self,
        sources: Sources,
        *,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_text: str | Sequence[str] | None = None,
        progress_total: int | Sequence[int] | None = None,
        priority: str = "normal",
        tenant: str | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> Future:
        """Like submit, but returns a concurrent.futures.Future of what Model.generate returns; no thread waits for it.

        Cancelling the future cancels the request. With asyncio: `await engine.future(text)`.
        """
        given = self._given(locals())
        return future(self._way(deadline, priority, tenant), self._call(given, options))

    def stream(
        self,
        source: Sources,
        *,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_text: str | Sequence[str] | None = None,
        progress_total: int | Sequence[int] | None = None,
        priority: str = "normal",
        tenant: str | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> Stream:
        """Submits one source and returns an asynchronous iterator over the pieces of its text: `async for piece in …`.

        The request is submitted at once, on this thread, which has to run an event loop; no thread waits for it. Cancelling
        the task, leaving the loop, and dropping or closing the stream cancel it.
        """
        given = self._given({**locals(), "sources": source})
        if given.rows != 1:
            raise ValueError(f"source: expected one, found {given.rows} (make a stream for each)")
        return stream(self._way(deadline, priority, tenant), self._call(given, options))

    def _given(self, arguments: dict[str, Any]) -> Given:
        """The sources among the arguments of a method."""
        for name in ("on_piece", "logits_processor", "prefix_allowed_tokens_fn", "encoder_outputs"):
            if name in arguments["options"]:
                raise TypeError(f"{name}: not supported by an engine; pass it to Model.generate")
        return Given(self._model, **{name: arguments[name] for name in SOURCES})

    def _call(self, given: Given, options: dict[str, Any]) -> Callable[[Any, Any], None]:
        """Submits a request with a t5g_call and the function that receives its end."""
        wanted, handle = generation_options(options), self._handle
        return lambda way, done: call(C.t5g_engine_call, handle, given.pointer, wanted, way, done, out=False)

    @staticmethod
    def _way(deadline: float | None, priority: str, tenant: str | None, **fields: Any) -> ctypes.Structure:
        if priority not in PRIORITIES:
            raise ValueError(f"priority: expected one of {', '.join(PRIORITIES)}, found {_forms.shown(priority)}")
        if tenant is not None and not isinstance(tenant, str):
            raise TypeError(f"tenant: expected text, found {_forms.shown(tenant)}")
        if tenant is not None and "\0" in tenant:
            raise ValueError("tenant: expected text without zeros, found one")
        return filled(
            "t5g_call",
            deadline_seconds=_calls.seconds_left(deadline),
            priority=PRIORITIES[priority],
            tenant=None if tenant is None else tenant.encode(),
            **fields,
        )

    @property
    def stats(self) -> dict[str, int]:
        """Counts of the engine's finished and current work, and its limits."""
        counts = filled("t5g_engine_counts")
        call(C.t5g_engine_stats, self._handle, ctypes.byref(counts), out=False)
        return {name: getattr(counts, name) for name, _ in counts._fields_[1:]}

    @property
    def stats_of_copies(self) -> list[dict[str, int]]:
        """The same for each copy of the model: its rows in flight and its steps."""
        counts = filled("t5g_engine_counts")
        copies = []
        for copy in range(self.stats["copies"]):
            call(C.t5g_engine_stats_of_copy, self._handle, copy, ctypes.byref(counts), out=False)
            copies.append({name: getattr(counts, name) for name, _ in counts._fields_[1:]})
        return copies

    def drain(self) -> None:
        """Stops accepting requests and waits until all accepted ones have ended."""
        handle = self._handle
        _calls.unstoppable(lambda: call(C.t5g_engine_drain, handle, out=False))

    def shutdown(self) -> None:
        """Cancels all requests and ends the engine."""
        call(C.t5g_engine_shutdown, self._handle, out=False)
