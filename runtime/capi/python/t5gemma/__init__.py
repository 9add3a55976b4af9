"""T5Gemma models from Python: the engine of libt5gemma, with numpy in and out.

    import t5gemma

    model = t5gemma.Model.open("model")
    for row in model.generate(["Dr. Smith paid $3.50.", "It costs $20."], num_beams=4, max_new_tokens=64):
        print(row[0].text)

Generation options are Hugging Face's, as keyword arguments. Calls do not hold the interpreter's lock but in callbacks of
the caller's. What each thing means is said in t5gemma.h, which lies in this package.
"""

from __future__ import annotations

import ctypes
import json
import queue
import threading
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, Sequence, Union

import numpy as np

from ._library import C, Error, call, callback, filled, take_text

__all__ = ["Cancellation", "Encoder", "Engine", "Error", "Hypothesis", "Model", "Request", "Tokenizer", "onnxruntime_report", "version"]

Sources = Union[str, Sequence[str], np.ndarray, Sequence[Sequence[int]], Sequence[Mapping[str, Any]]]
"""A text, texts, a rectangle of token ids, rows of token ids of any lengths, or a conversation: {"role", "content"} each."""

FINISH_REASONS = ("", "eos", "length", "stop_string", "time", "constraint", "constraint_incomplete")


def version() -> str:
    """The library's version."""
    return C.t5g_version().decode()


def onnxruntime_report(library: str | None = None) -> dict[str, Any]:
    """Where ONNX Runtime was looked for, and which is used."""
    return json.loads(take_text(C.t5g_onnxruntime_report, None if library is None else library.encode()))


@dataclass(frozen=True)
class Hypothesis:
    """A target, generated or scored."""

    tokens: np.ndarray
    """int64, without prompt and padding, with the end token if there is one."""
    text: str | None
    """Without special tokens; None where the model has no tokenizer."""
    finish_reason: str
    score: float | None
    """Of beam search."""
    logprob: float | None
    perplexity: float | None
    logprobs: np.ndarray | None
    """float32, of each token, with output_logprobs."""
    top_tokens: np.ndarray | None
    """[tokens, top_logprobs], best first."""
    top_logprobs: np.ndarray | None
    cross_attentions: np.ndarray | None
    """float32 [tokens, source tokens], with output_attentions: how much each token attended to each of the source."""


class _Owner:
    """Holds a handle, which is freed with it."""

    _free: str

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def close(self) -> None:
        """Frees the object now; calls that are under way end well."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            getattr(C, self._free)(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Cancellation(_Owner):
    """Stops the calls that it is given to, from any thread, once and for all."""

    _free = "t5g_cancellation_free"

    def __init__(self) -> None:
        super().__init__(call(C.t5g_cancellation_new))

    def cancel(self) -> None:
        call(C.t5g_cancellation_cancel, self._handle, out=False)

    @property
    def is_cancelled(self) -> bool:
        return C.t5g_cancellation_is_cancelled(self._handle) == 1


class Tokenizer(_Owner):
    """A model's tokenizer."""

    _free = "t5g_tokenizer_free"

    @classmethod
    def open(cls, path: str) -> Tokenizer:
        """Reads a tokenizer.json."""
        return cls(call(C.t5g_tokenizer_open, str(path).encode()))

    def encode(self, text: str, target: bool = False) -> np.ndarray:
        """The tokens of a source, or of a target: without any special tokens around it."""
        data = text.encode()
        tokens = call(C.t5g_tokenizer_encode, self._handle, data, len(data), int(target))
        try:
            return _copied(C.t5g_tokens_data(tokens), (C.t5g_tokens_size(tokens),), np.int64)
        finally:
            C.t5g_tokens_free(tokens)

    def decode(self, tokens: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """The text of tokens, without special tokens or with them."""
        ids = _numbers(tokens, np.int64)
        return take_text(C.t5g_tokenizer_decode, self._handle, ids.ctypes.data, ids.size, int(special))

    def token(self, token: int) -> str:
        """The piece of the vocabulary that an id stands for; empty if there is none."""
        return take_text(C.t5g_tokenizer_token, self._handle, int(token))


class _Opened(_Owner):
    """What models and encoders have in common."""

    _name: str

    @classmethod
    def open(
        cls,
        path: str,
        *,
        library: str | None = None,
        threads: int | None = None,
        check_weights: bool = False,
        **options: Any,
    ):
        """Opens a model folder. `library` is ONNX Runtime's file; further options are those of t5g_open_options."""
        options = {"library": library and str(library), "threads": threads, **options}
        options = {name: value for name, value in options.items() if value is not None}
        if check_weights:
            options["check_weights"] = True
        given = filled("t5g_open_options", json=json.dumps(options).encode())
        return cls(call(getattr(C, f"t5g_{cls._name}_open"), str(path).encode(), ctypes.byref(given)))

    def describe(self) -> dict[str, Any]:
        """What the model is: its task, sizes, special tokens, labels."""
        return json.loads(take_text(getattr(C, f"t5g_{self._name}_describe"), self._handle))

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(call(getattr(C, f"t5g_{self._name}_tokenizer"), self._handle))


class Model(_Opened):
    """An opened model, for any number of threads."""

    _free, _name = "t5g_model_free", "model"

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the text that the model continues, by the checkpoint's own template."""
        return take_text(C.t5g_model_chat, self._handle, json.dumps(messages).encode())

    def generate(
        self,
        sources: Sources,
        *,
        attention_mask: np.ndarray | None = None,
        decoder_input_ids: np.ndarray | None = None,
        decoder_text: str | Sequence[str] | None = None,
        encoder_outputs: np.ndarray | None = None,
        cancellation: Cancellation | None = None,
        deadline: float = 0.0,
        on_piece: Callable[[int, int, str], bool | None] | None = None,
        logits_processor: Callable[[np.ndarray, np.ndarray], None] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        """Generates targets: for each source its hypotheses, best first.

        `on_piece` is given row, token (-1 with the last text of a row) and text as they become certain; False stops.
        `logits_processor` is given the target so far and its next token's scores, which it changes in place.
        """
        given = _Given(sources, attention_mask, decoder_input_ids, decoder_text, encoder_outputs)
        wanted = filled("t5g_generation_options", json=json.dumps(options).encode())
        callbacks = _Callbacks(cancellation, deadline, on_piece, logits_processor, prefix_allowed_tokens_fn)
        with callbacks:
            result = call(
                C.t5g_model_generate, self._handle, given.pointer, ctypes.byref(wanted), callbacks.pointer
            )
        return _taken(result)

    def stream(self, source: Sources, **options: Any) -> Iterator[str]:
        """Generates the target of one source and gives its text piece by piece; leaving the loop stops it."""
        pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        cancellation = Cancellation()

        def work() -> None:
            try:
                show = lambda row, token, text: pieces.put(text)  # noqa: E731
                self.generate(source, cancellation=cancellation, on_piece=show, **options)
                pieces.put(None)
            except BaseException as error:  # carried over to the thread that reads
                pieces.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            cancellation.cancel()
            thread.join()

    def score(
        self,
        sources: Sources,
        targets: Sequence[str] | Sequence[Sequence[int]],
        *,
        top_logprobs: int = 0,
        without_end: bool = False,
        output_attentions: bool = False,
        attention_mask: np.ndarray | None = None,
        cancellation: Cancellation | None = None,
        deadline: float = 0.0,
    ) -> list[Hypothesis]:
        """How likely targets are, one for each source."""
        given = _Given(sources, attention_mask)
        wanted = filled(
            "t5g_targets", without_end=int(without_end), output_attentions=int(output_attentions)
        )
        if all(isinstance(target, str) for target in targets):
            texts, sizes, keep = _texts(targets)
            wanted.texts, wanted.text_sizes = ctypes.addressof(texts), ctypes.addressof(sizes)
        else:
            ids, lengths = _ragged(targets)
            keep = (ids, lengths)
            wanted.target_ids, wanted.lengths = ids.ctypes.data, lengths.ctypes.data
        with _Callbacks(cancellation, deadline) as callbacks:
            result = call(
                C.t5g_model_score, self._handle, given.pointer, ctypes.byref(wanted), top_logprobs, callbacks.pointer
            )
        del keep
        return [row[0] for row in _taken(result)]

    def encode(self, sources: Sources, *, attention_mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's last hidden states, [rows, length, hidden_size], and the mask, [rows, length]."""
        given = _Given(sources, attention_mask)
        return _states(lambda states: call(C.t5g_model_encode, self._handle, given.pointer, None, states, out=False))


class Request(_Owner):
    """A request that an engine was given; for one thread at a time. Freeing it cancels it."""

    _free = "t5g_request_free"

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """Row, token (-1 with the last text of a row) and text as they become certain."""
        event, kinds = filled("t5g_event"), C.constants
        while True:
            call(C.t5g_request_poll, self._handle, 0.1, ctypes.byref(event), out=False)
            if event.kind == kinds["T5G_EVENT_PIECE"]:
                text = ctypes.string_at(event.text, event.text_size).decode() if event.text else ""
                yield event.row, event.token, text
            elif event.kind == kinds["T5G_EVENT_END"]:
                return

    def cancel(self) -> None:
        """Ends the request, from any thread."""
        call(C.t5g_request_cancel, self._handle, out=False)

    def result(self) -> list[list[Hypothesis]]:
        """Waits for the end: what Model.generate returns."""
        for _ in self:
            pass
        return _taken(call(C.t5g_request_result, self._handle))


class Engine(_Owner):
    """Generates for many requests in one batch, for any number of threads.

    `devices` are the numbers of the GPUs to compute on, each with a copy of the model: all take rows from one line. The model
    itself is that on its own device; the others are opened as it was. Bounds of rows and bytes are for each.
    """

    _free = "t5g_engine_free"

    def __init__(
        self,
        model: Model,
        *,
        max_rows: int | None = None,
        max_bytes: int | None = None,
        max_waiting: int | None = None,
        devices: Sequence[int] | None = None,
    ) -> None:
        bounds = {"max_rows": max_rows, "max_bytes": max_bytes, "max_waiting": max_waiting}
        given = filled("t5g_engine_options", **{name: value for name, value in bounds.items() if value is not None})
        if devices is not None:
            if not len(devices):
                raise ValueError("devices: expected at least one, found none")
            numbers = (ctypes.c_int64 * len(devices))(*devices)
            given.devices, given.device_count = ctypes.addressof(numbers), len(devices)
        super().__init__(call(C.t5g_engine_new, model._handle, ctypes.byref(given)))

    def submit(
        self,
        sources: Sources,
        *,
        attention_mask: np.ndarray | None = None,
        decoder_input_ids: np.ndarray | None = None,
        decoder_text: str | Sequence[str] | None = None,
        stream_text: bool = False,
        cancellation: Cancellation | None = None,
        deadline: float = 0.0,
        **options: Any,
    ) -> Request:
        """Submits sources; `deadline` counts from now, waiting included."""
        given = _Given(sources, attention_mask, decoder_input_ids, decoder_text)
        wanted = filled("t5g_generation_options", json=json.dumps(options).encode())
        way = filled("t5g_call", deadline_seconds=deadline, stream_text=int(stream_text))
        if cancellation is not None:
            way.cancellation = cancellation._handle
        pointers = given.pointer, ctypes.byref(wanted), ctypes.byref(way)
        return Request(call(C.t5g_engine_submit, self._handle, *pointers))

    @property
    def stats(self) -> dict[str, int]:
        """What the engine has done and is doing, and its bounds."""
        counts = filled("t5g_engine_counts")
        call(C.t5g_engine_stats, self._handle, ctypes.byref(counts), out=False)
        return {name: getattr(counts, name) for name, _ in counts._fields_[1:]}

    @property
    def stats_of_copies(self) -> list[dict[str, int]]:
        """The same with what each copy of the model has in flight and its steps."""
        counts = filled("t5g_engine_counts")
        copies = []
        for copy in range(self.stats["copies"]):
            call(C.t5g_engine_stats_of_copy, self._handle, copy, ctypes.byref(counts), out=False)
            copies.append({name: getattr(counts, name) for name, _ in counts._fields_[1:]})
        return copies

    def drain(self) -> None:
        """Takes no more requests, and waits until all that were taken have ended."""
        call(C.t5g_engine_drain, self._handle, out=False)

    def shutdown(self) -> None:
        """Ends everything at once."""
        call(C.t5g_engine_shutdown, self._handle, out=False)


class Encoder(_Opened):
    """An opened encoder or classifier, for any number of threads."""

    _free, _name = "t5g_encoder_free", "encoder"

    def encode(self, sources: Sources, *, attention_mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states, [rows, length, hidden_size], and the mask, [rows, length]."""
        given = _Given(sources, attention_mask)
        return _states(
            lambda states: call(C.t5g_encoder_encode, self._handle, given.pointer, 0, 0, None, states, out=False)
        )

    def embed(
        self,
        sources: Sources,
        pooling: str = "mean",
        *,
        normalize: bool = False,
        attention_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """One vector for each source, [rows, hidden_size]."""
        given, kind = _Given(sources, attention_mask), _index(("none", "mean", "first", "last"), "pooling", pooling)
        values, _ = _states(
            lambda states: call(
                C.t5g_encoder_encode, self._handle, given.pointer, kind, int(normalize), None, states, out=False
            )
        )
        return values[:, 0]

    def classify(
        self, sources: Sources, function: str = "default", *, attention_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """The scores of each source's labels, [rows, labels], or of each token's, [rows, length, labels]."""
        given = _Given(sources, attention_mask)
        kind = _index(("default", "none", "sigmoid", "softmax"), "function", function)
        values, _ = _states(
            lambda states: call(C.t5g_encoder_classify, self._handle, given.pointer, kind, None, states, out=False)
        )
        return values if self.describe()["task"] == "token-classification" else values[:, 0]


def _index(names: Sequence[str], what: str, name: str) -> int:
    if name not in names:
        raise ValueError(f"{what}: expected one of {', '.join(names)}, found {name!r}")
    return names.index(name)


def _numbers(values: Any, dtype: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.size and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"expected {np.dtype(dtype)}, found {array.dtype}")
    return np.ascontiguousarray(array, dtype=dtype)


def _copied(pointer: int | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    array = np.empty(shape, dtype)
    if array.size:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
    return array


def _texts(texts: Sequence[str]) -> tuple[ctypes.Array, ctypes.Array, list[bytes]]:
    data = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(data))(*data), (ctypes.c_size_t * len(data))(*map(len, data)), data


def _ragged(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [_numbers(row, np.int64).reshape(-1) for row in rows]
    lengths = np.array([array.size for array in arrays], np.uintp)
    return (np.concatenate(arrays) if arrays else np.empty(0, np.int64)), lengths


class _Given:
    """Sources as t5gemma.h takes them, with what they point to."""

    def __init__(
        self,
        sources: Sources,
        mask: np.ndarray | None = None,
        decoder_input_ids: np.ndarray | None = None,
        decoder_text: str | Sequence[str] | None = None,
        encoder_outputs: np.ndarray | None = None,
    ) -> None:
        self._keep: list[Any] = []
        given = self._given = filled("t5g_sources")
        if isinstance(sources, str):
            sources = [sources]
        given.rows = len(sources)
        if isinstance(sources, np.ndarray):
            ids = self._kept(_numbers(sources, np.int64))
            if ids.ndim != 2:
                raise ValueError(f"sources: expected [rows, length], found shape {ids.shape}")
            given.input_ids, given.length = ids.ctypes.data, ids.shape[1]
        elif sources and all(isinstance(source, str) for source in sources):
            texts, sizes, _ = self._kept(_texts(sources))
            given.texts, given.text_sizes = ctypes.addressof(texts), ctypes.addressof(sizes)
        elif sources and all(isinstance(source, Mapping) for source in sources):
            given.rows, given.messages = 1, self._kept(json.dumps(list(sources)).encode())
        else:
            ids, lengths = self._kept(_ragged(sources))
            given.input_ids, given.lengths = ids.ctypes.data, lengths.ctypes.data
        if mask is not None:
            mask = self._kept(_numbers(mask, np.int64))
            if not isinstance(sources, np.ndarray) or mask.shape != sources.shape:
                raise ValueError(f"attention_mask: expected sources of its shape, found {mask.shape}")
            given.attention_mask = mask.ctypes.data
        if decoder_input_ids is not None:
            prompts = self._kept(_numbers(decoder_input_ids, np.int64))
            if prompts.ndim != 2 or prompts.shape[0] != given.rows:
                raise ValueError(f"decoder_input_ids: expected [{given.rows}, length], found {prompts.shape}")
            given.decoder_input_ids, given.decoder_length = prompts.ctypes.data, prompts.shape[1]
        if decoder_text is not None:
            beginnings = [decoder_text] * given.rows if isinstance(decoder_text, str) else decoder_text
            if len(beginnings) != given.rows:
                raise ValueError(f"decoder_text: expected {given.rows} texts, found {len(beginnings)}")
            given.decoder_texts = ctypes.addressof(self._kept(_texts(beginnings))[0])
        if encoder_outputs is not None:
            states = self._kept(_numbers(encoder_outputs, np.float32))
            longest = given.length or max((len(row) for row in sources), default=0)
            if states.ndim != 3 or states.shape[0] != given.rows or (
                not given.texts and not given.messages and states.shape[1] != longest
            ):
                raise ValueError(f"encoder_outputs: expected [rows, length, hidden_size], found {states.shape}")
            given.encoder_outputs = states.ctypes.data

    def _kept(self, value: Any) -> Any:
        self._keep.append(value)
        return value

    @property
    def pointer(self) -> Any:
        return ctypes.byref(self._given)


class _Callbacks:
    """A t5g_call, and the exception that one of its callbacks has raised."""

    def __init__(
        self,
        cancellation: Cancellation | None = None,
        deadline: float = 0.0,
        on_piece: Callable[[int, int, str], bool | None] | None = None,
        logits_processor: Callable[[np.ndarray, np.ndarray], None] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
    ) -> None:
        self._raised: BaseException | None = None
        self._allowed = np.empty(0, np.int64)
        self._given = filled("t5g_call", deadline_seconds=deadline)
        if cancellation is not None:
            self._given.cancellation = cancellation._handle
        if on_piece is not None:

            def piece(_: int, pointer: int) -> int:
                shown = C.structs["t5g_piece"].from_address(pointer)
                text = ctypes.string_at(shown.text, shown.text_size).decode() if shown.text else ""
                return int(self._guarded(lambda: on_piece(shown.row, shown.token, text)) is False)

            self._given.stream_text = 1
            self._set("on_piece", piece)
        if logits_processor is not None:

            def change(_: int, pointer: int, scores: int, count: int) -> None:
                place = C.structs["t5g_position"].from_address(pointer)
                target = _copied(place.target, (place.target_length,), np.int64)
                seen = np.ctypeslib.as_array((ctypes.c_float * count).from_address(scores))
                self._guarded(lambda: logits_processor(target, seen))

            self._set("logits_processor", change)
        if prefix_allowed_tokens_fn is not None:

            def allow(_: int, row: int, pointer: int, length: int, allowed: int) -> int:
                target = _copied(pointer, (length,), np.int64)
                tokens = self._guarded(lambda: _numbers(prefix_allowed_tokens_fn(row, target), np.int64))
                self._allowed = tokens if isinstance(tokens, np.ndarray) else np.empty(0, np.int64)
                ctypes.c_void_p.from_address(allowed).value = self._allowed.ctypes.data
                return self._allowed.size

            self._set("prefix_allowed_tokens", allow)
        if on_piece is not None or logits_processor is not None or prefix_allowed_tokens_fn is not None:
            self._set("on_step", lambda _: int(self._raised is not None))

    def _set(self, name: str, function: Callable[..., Any]) -> None:
        made = callback("t5g_call", name)(function)
        setattr(self, f"_{name}", made)
        setattr(self._given, name, ctypes.cast(made, ctypes.c_void_p))

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work() if self._raised is None else False
        except BaseException as error:  # raised again by the call that this belongs to
            self._raised = error
            return False

    @property
    def pointer(self) -> Any:
        return ctypes.byref(self._given)

    def __enter__(self) -> _Callbacks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._raised is not None:
            raise self._raised


def _taken(result: int) -> list[list[Hypothesis]]:
    """A result's hypotheses, copied; the result is freed."""
    try:
        rows = range(C.t5g_result_rows(result))
        return [[_hypothesis(result, row, at) for at in range(C.t5g_result_count(result, row))] for row in rows]
    finally:
        C.t5g_result_free(result)


def _hypothesis(result: int, row: int, index: int) -> Hypothesis:
    found = filled("t5g_hypothesis")
    call(C.t5g_result_get, result, row, index, ctypes.byref(found), out=False)
    data, size = ctypes.c_void_p(), ctypes.c_size_t()
    try:
        call(C.t5g_result_text, result, row, index, ctypes.byref(data), ctypes.byref(size), out=False)
        text = ctypes.string_at(data, size.value).decode()
    except Error as error:
        if error.code != C.constants["T5G_ERROR_TOKENIZER"]:
            raise
        text = None
    count, top = found.token_count, (found.token_count, found.top_count)
    number = lambda value: None if value != value else value  # noqa: E731
    return Hypothesis(
        tokens=_copied(found.tokens, (count,), np.int64),
        text=text,
        finish_reason=FINISH_REASONS[found.finish_reason],
        score=number(found.score),
        logprob=number(found.logprob),
        perplexity=number(found.perplexity),
        logprobs=_copied(found.logprobs, (count,), np.float32) if found.logprobs else None,
        top_tokens=_copied(found.top_tokens, top, np.int64) if found.top_count else None,
        top_logprobs=_copied(found.top_logprobs, top, np.float32) if found.top_count else None,
        cross_attentions=_copied(found.cross_attentions, (count, found.source_length), np.float32)
        if found.cross_attentions
        else None,
    )


def _states(compute: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Asks for the sizes, then for the numbers, which are written into arrays."""
    states = filled("t5g_states")
    compute(ctypes.byref(states))
    values = np.empty((states.rows, states.length, states.width), np.float32)
    mask = np.empty((states.rows, states.mask_length), np.int64)
    states.values, states.capacity = values.ctypes.data, values.size
    states.attention_mask, states.mask_capacity = mask.ctypes.data, mask.size
    compute(ctypes.byref(states))
    return values, mask
