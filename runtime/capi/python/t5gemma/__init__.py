"""T5Gemma models from Python: the engine of libt5gemma, with numpy in and out.

    import t5gemma

    model = t5gemma.Model.open("model")
    texts = ["Dr. Smith paid $3.50.", "Prof. Lee lives at 1420 Elm St. in Boston."]
    for row in model.generate(texts, num_beams=4, max_new_tokens=64):
        print(row[0].text)

t5gemma._forms lists the accepted forms of sources, targets and token ids. Generation options are keyword arguments with
their Hugging Face names: numbers, strings, bools and lists of these, numpy's included. The header t5gemma.h in this
package is the reference.

Calls release the interpreter lock except in callbacks, which run on the calling thread. Ctrl-C ends a call of the main
thread, and an exception raised by a callback is raised by its call. `deadline` is in seconds from now: a call that has
not finished by then fails with T5G_ERROR_DEADLINE.

Copying or unpickling a Model, an Encoder or a Tokenizer opens it again. After a fork, the child can use those of its
parent if no call and no engine was running at the fork; it has to make its own engines and requests.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from typing import Any, Callable, Iterator, Mapping, Sequence, TypeVar

import numpy as np

from . import _calls, _forms
from ._calls import Call, Cancellation, copied
from ._library import C, Error, Handle, Owner, call, filled, take_text
from ._futures import Future, future
from ._images import Images
from ._results import Hypothesis, result, states, stats_of, taken
from ._sources import Given, Ids, Sources, Targets, messages as messages_of

__all__ = [
    "Cancellation",
    "Encoder",
    "Engine",
    "Error",
    "Future",
    "Hypothesis",
    "Model",
    "Request",
    "Tokenizer",
    "onnxruntime_report",
    "version",
]

# Tracebacks and pickles name the public module.
for _public in (Cancellation, Error, Future, Hypothesis):
    _public.__module__ = __name__


def version() -> str:
    """The library's version."""
    return C.t5g_version().decode()


def onnxruntime_report(library: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Where ONNX Runtime was searched for, and which library is used."""
    return json.loads(take_text(C.t5g_onnxruntime_report, None if library is None else _forms.path("library", library)))


def _open(cls: Any, path: str, options: dict[str, Any], adapters: Mapping[str, str] = {}) -> Any:
    """Opens an object that was pickled or copied."""
    opened = cls.open(path, **options)
    for name, folder in adapters.items():
        opened.load_adapter(name, folder)
    return opened


class Tokenizer(Owner):
    """A model's tokenizer."""

    _name = "tokenizer"

    def __init__(self, handle: Handle, path: str) -> None:
        super().__init__(handle)
        self._path = path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a tokenizer.json."""
        given = _forms.path("path", path)
        return cls(Handle(call(C.t5g_tokenizer_open, given), C.t5g_tokenizer_free), os.path.abspath(path))

    def __reduce__(self) -> Any:
        self._check()
        return _open, (type(self), self._path, {})

    def encode(self, text: str, target: bool = False) -> np.ndarray:
        """The token ids of a text, int64: of a source, with special tokens, or of a target, without."""
        data = _forms.utf8("text", text)
        tokens = call(C.t5g_tokenizer_encode, self._handle, data, len(data), _forms.flag("target", target))
        try:
            return copied(C.t5g_tokens_data(tokens), (C.t5g_tokens_size(tokens),), np.int64)
        finally:
            C.t5g_tokens_free(tokens)

    def decode(self, tokens: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """The text of a row of token ids, with or without special tokens."""
        ids = _forms.row("tokens", tokens)
        return take_text(C.t5g_tokenizer_decode, self._handle, ids.ctypes.data, ids.size, _forms.flag("special", special))

    def token(self, token: int) -> str:
        """The vocabulary entry of a token id; empty if there is none."""
        return take_text(C.t5g_tokenizer_token, self._handle, _forms.whole("token", token))


O = TypeVar("O", bound="_Opened")


class _Opened(Owner):
    """The common part of models and encoders."""

    _after_fork = "as it was"

    def __init__(self, handle: Handle, path: str, options: dict[str, Any]) -> None:
        super().__init__(handle)
        self._path, self._options = path, options
        self._known: dict[str, Any] | None = None
        self._adapters: dict[str, str] = {}

    @classmethod
    def open(
        cls: type[O],
        path: str | os.PathLike[str],
        *,
        library: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        check_weights: bool = False,
        **options: Any,
    ) -> O:
        """Opens a model folder. `library` is the file of ONNX Runtime; other options are those of t5g_open_options."""
        folder = _forms.path("path", path)
        if library is not None:
            options["library"] = _forms.path("library", library).decode()
        if threads is not None:
            options["threads"] = threads
        if _forms.flag("check_weights", check_weights):
            options["check_weights"] = True
        options = {name: _forms.plain_paths(name, value) for name, value in options.items() if value is not None}
        given = filled("t5g_open_options", json=json.dumps(options).encode())
        function, free = getattr(C, f"t5g_{cls._name}_open"), getattr(C, f"t5g_{cls._name}_free")
        handle = _calls.unstoppable(lambda: Handle(call(function, folder, ctypes.byref(given)), free))
        return cls(handle, os.path.abspath(path), options)

    def __reduce__(self) -> Any:
        self._check()
        return _open, (type(self), self._path, self._options, dict(self._adapters))

    def describe(self) -> dict[str, Any]:
        """The task, sizes, special tokens and labels of the model."""
        return json.loads(take_text(getattr(C, f"t5g_{self._name}_describe"), self._handle))

    @property
    def _facts(self) -> dict[str, Any]:
        """The result of `describe`, cached."""
        if self._known is None:
            self._known = self.describe()
        return self._known

    @property
    def tokenizer(self) -> Tokenizer:
        handle = call(getattr(C, f"t5g_{self._name}_tokenizer"), self._handle)
        return Tokenizer(Handle(handle, C.t5g_tokenizer_free), os.path.join(self._path, "tokenizer.json"))


class Model(_Opened):
    """A model. Any number of threads may use it at once."""

    _name = "model"

    def warm_up(self, *, cancellation: Cancellation | None = None, deadline: float | None = None) -> None:
        """Generates a few tokens for sources of typical shapes, so that the first request is as fast as later ones."""
        handle = self._handle
        Call(cancellation, deadline).run(lambda how: call(C.t5g_model_warm_up, handle, how, out=False))

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Loads the PEFT LoRA adapter in `folder` as `name`, for the argument `adapter` of other methods.

        The model must be exported with `t5gemma-export --lora-inputs RANK`. An engine uses the adapters of the model that
        it was created with.
        """
        given, path, handle = _forms.plain_name("name", name), _forms.path("folder", folder), self._handle
        _calls.unstoppable(lambda: call(C.t5g_model_load_adapter, handle, given, path, out=False))
        self._adapters[name] = os.path.abspath(folder)

    def unload_adapter(self, name: str) -> None:
        """Unloads an adapter. Calls and requests that use it already are not disturbed."""
        call(C.t5g_model_unload_adapter, self._handle, _forms.plain_name("name", name), out=False)
        self._adapters.pop(name, None)

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        return json.loads(take_text(C.t5g_model_adapters, self._handle))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Formats a conversation with the checkpoint's chat template: the text that the model continues."""
        return take_text(C.t5g_model_chat, self._handle, messages_of("messages", messages))

    def generate(
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
        encoder_outputs: np.ndarray | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
        on_piece: Callable[[int, int, str], bool | None] | None = None,
        logits_processor: Callable[[np.ndarray, np.ndarray], None] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        """Generates targets: for each source its hypotheses, best first.

        `attention_mask` is 0 where a token is padding. `decoder_input_ids` or `decoder_text` is the beginning of the
        targets: a row for each source, all of one length, or one text for all. `encoder_outputs` is what `encode`
        returned for these sources, [rows, length, hidden_size]. `progress_total` is the expected length of each target
        in tokens, the start token included, for models whose positions depend on it.

        `images` are those of a source, or a list for each: paths, bytes of JPEG, PNG and WebP files, PIL images, or
        arrays [height, width, 3] of uint8. In a text, each "<start_of_image>" stands for one. `pixel_values`, float32
        [images, 3, image_size, image_size], are exact numbers instead, for token ids. With `pan_and_scan`, crops follow
        images that are much wider than high or the reverse.

        `on_piece` receives row, token (-1 with the last text of a row) and text as they become final; returning False
        stops. `logits_processor` receives the target so far and the scores of its next token, which it changes in
        place. `prefix_allowed_tokens_fn` receives the row and its target so far, and returns the token ids that may
        follow.
        """
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        begun = attention_mask, decoder_input_ids, decoder_text, encoder_outputs, progress_total
        given = Given(self, sources, *begun, **seen)
        wanted, handle = _options(options), self._handle
        way = Call(cancellation, deadline, on_piece, logits_processor, prefix_allowed_tokens_fn)
        return taken(way.run(lambda how: result(call(C.t5g_model_generate, handle, given.pointer, wanted, how))))

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
        encoder_outputs: np.ndarray | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
        logits_processor: Callable[[np.ndarray, np.ndarray], None] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Generates the target of one source and yields its text piece by piece; leaving the loop stops the generation.

        Generation starts with the loop and continues while the loop does other things. Callbacks run on a separate
        thread.
        """
        if "on_piece" in options:
            raise TypeError("on_piece: stream yields the pieces; generate takes a callback")
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        begun = attention_mask, decoder_input_ids, decoder_text, encoder_outputs, progress_total
        given = Given(self, source, *begun, **seen)
        if given.rows != 1:
            raise ValueError(f"source: expected one, found {given.rows} (generate takes several, with on_piece)")
        wanted, handle = _options(options), self._handle
        show: list[Callable[[str], None]] = []
        piece = lambda row, token, text: show[0](text) if text else None  # noqa: E731
        way = Call(cancellation, deadline, piece, logits_processor, prefix_allowed_tokens_fn)

        def work(how: Any) -> Handle:
            return result(call(C.t5g_model_generate, handle, given.pointer, wanted, how))

        def pieces() -> Iterator[str]:
            job = _calls.Job(lambda: way.run_here(work))
            show.append(job.tell)
            job.start()
            try:
                while (text := job.next()) is not None:
                    yield text
                job.result()
            finally:
                way.stop()
                while job.next() is not None:
                    pass

        return pieces()

    def score(
        self,
        sources: Sources,
        targets: Targets,
        *,
        top_logprobs: int = 0,
        without_end: bool = False,
        output_attentions: bool = False,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        progress_total: int | Sequence[int] | None = None,
        adapter: str | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
    ) -> list[Hypothesis]:
        """Scores targets, one per source. The end token is appended to texts and scored, unless `without_end`."""
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        given = Given(self, sources, attention_mask, progress_total=progress_total, adapter=adapter, **seen)
        handle = self._handle
        flags = {"without_end": without_end, "output_attentions": output_attentions}
        wanted = ctypes.byref(given.targets(targets, **{name: _forms.flag(name, flag) for name, flag in flags.items()}))
        top, way = _forms.whole("top_logprobs", top_logprobs, 0), Call(cancellation, deadline)
        scored = way.run(lambda how: result(call(C.t5g_model_score, handle, given.pointer, wanted, top, how)))
        return [row[0] for row in taken(scored)]

    def encode(
        self,
        sources: Sources,
        *,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        adapter: str | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's last hidden states, float32 [rows, length, hidden_size], and the mask, int64 [rows, length]."""
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        given, handle = Given(self, sources, attention_mask, adapter=adapter, **seen), self._handle
        way = Call(cancellation, deadline)
        return way.run(
            lambda how: states(lambda found: call(C.t5g_model_encode, handle, given.pointer, how, found, out=False))
        )


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
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        seen["progress_total"] = progress_total
        given = self._given(sources, attention_mask, decoder_input_ids, decoder_text, seen, options)
        way = self._way(deadline, priority, tenant, stream_text=_forms.flag("stream_text", stream_text))
        if cancellation is not None:
            way.cancellation = _calls.checked(cancellation)._handle
        request = call(C.t5g_engine_submit, self._handle, given.pointer, _options(options), ctypes.byref(way))
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

        Cancelling the future cancels the request. With asyncio: `await asyncio.wrap_future(engine.future(text))`.
        """
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        seen["progress_total"] = progress_total
        given = self._given(sources, attention_mask, decoder_input_ids, decoder_text, seen, options)
        way, wanted, handle = self._way(deadline, priority, tenant), _options(options), self._handle
        return future(way, lambda how, done: call(C.t5g_engine_call, handle, given.pointer, wanted, how, done, out=False))

    def _given(self, sources: Any, mask: Any, ids: Any, text: Any, seen: dict[str, Any], options: dict[str, Any]) -> Given:
        for name in ("on_piece", "logits_processor", "prefix_allowed_tokens_fn", "encoder_outputs"):
            if name in options:
                raise TypeError(f"{name}: not supported by an engine; pass it to Model.generate")
        return Given(self._model, sources, mask, ids, text, **seen)

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


class Encoder(_Opened):
    """An encoder or classifier. Any number of threads may use it at once."""

    _name = "encoder"

    def encode(
        self,
        sources: Sources,
        *,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states, float32 [rows, length, hidden_size], and the mask, int64 [rows, length]."""
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        given, way = Given(self, sources, attention_mask, **seen), Call(cancellation, deadline)
        return self._states(C.t5g_encoder_encode, way, given, 0, 0)

    def embed(
        self,
        sources: Sources,
        pooling: str = "mean",
        *,
        normalize: bool = False,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
    ) -> np.ndarray:
        """One vector per source, float32 [rows, hidden_size], L2-normalized with `normalize`.

        `pooling` is "mean", "first" or "last".
        """
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        given, way = Given(self, sources, attention_mask, **seen), Call(cancellation, deadline)
        kind = 1 + _forms.choice("pooling", pooling, ("mean", "first", "last"))
        values, _ = self._states(C.t5g_encoder_encode, way, given, kind, _forms.flag("normalize", normalize))
        return values[:, 0]

    def classify(
        self,
        sources: Sources,
        function: str = "default",
        *,
        attention_mask: Ids | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
        cancellation: Cancellation | None = None,
        deadline: float | None = None,
    ) -> np.ndarray:
        """The label scores of each source, float32 [rows, labels], or of each token, [rows, length, labels].

        `function` is applied to the logits: "none", "sigmoid", "softmax", or "default", the choice of transformers'
        pipelines.
        """
        seen = {"images": images, "pixel_values": pixel_values, "pan_and_scan": pan_and_scan}
        given, way = Given(self, sources, attention_mask, **seen), Call(cancellation, deadline)
        kind = _forms.choice("function", function, ("default", "none", "sigmoid", "softmax"))
        values, _ = self._states(C.t5g_encoder_classify, way, given, kind)
        return values if self._facts["task"] == "token-classification" else values[:, 0]

    def _states(self, function: Any, way: Call, given: Given, *kinds: int) -> tuple[np.ndarray, np.ndarray]:
        handle = self._handle
        return way.run(lambda how: states(lambda found: call(function, handle, given.pointer, *kinds, how, found, out=False)))


def _options(options: dict[str, Any]) -> Any:
    """A t5g_generation_options."""
    plain = {name: _forms.plain(name, value) for name, value in options.items()}
    return ctypes.byref(filled("t5g_generation_options", json=json.dumps(plain).encode()))
