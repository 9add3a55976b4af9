"""Results of the library, copied into Python and numpy objects."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np

from ._calls import copied
from ._library import C, Error, Handle, call, filled

FINISH_REASONS = ("", "eos", "length", "stop_string", "time", "constraint", "constraint_incomplete")


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
    """float32 [tokens, source tokens], with output_attentions: the attention of each token to each source token."""


def result(handle: int) -> Handle:
    """A result, which is freed even if nothing takes it."""
    return Handle(handle, C.t5g_result_free)


def stats_of(given: Handle) -> dict[str, float | int | None]:
    """Times in seconds and counts of a result; a time is None if there is none."""
    found = filled("t5g_request_stats")
    call(C.t5g_result_stats, given.number, ctypes.byref(found), out=False)
    fields = ((name, getattr(found, name)) for name, _ in found._fields_[1:])
    return {name: None if value != value else value for name, value in fields}


def rows_of(given: Handle) -> list[list[Hypothesis]]:
    """The hypotheses of a result, copied."""
    rows = range(C.t5g_result_rows(given.number))
    return [[_hypothesis(given.number, row, at) for at in range(C.t5g_result_count(given.number, row))] for row in rows]


def taken(given: Handle) -> list[list[Hypothesis]]:
    """The same; the result is freed."""
    try:
        return rows_of(given)
    finally:
        given.free()


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
        tokens=copied(found.tokens, (count,), np.int64),
        text=text,
        finish_reason=FINISH_REASONS[found.finish_reason],
        score=number(found.score),
        logprob=number(found.logprob),
        perplexity=number(found.perplexity),
        logprobs=copied(found.logprobs, (count,), np.float32) if found.logprobs else None,
        top_tokens=copied(found.top_tokens, top, np.int64) if found.top_count else None,
        top_logprobs=copied(found.top_logprobs, top, np.float32) if found.top_count else None,
        cross_attentions=copied(found.cross_attentions, (count, found.source_length), np.float32)
        if found.cross_attentions
        else None,
    )


def states(compute: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Queries the sizes, then computes into arrays of these sizes."""
    found = filled("t5g_states")
    compute(ctypes.byref(found))
    values = np.empty((found.rows, found.length, found.width), np.float32)
    mask = np.empty((found.rows, found.mask_length), np.int64)
    found.values, found.capacity = values.ctypes.data, values.size
    found.attention_mask, found.mask_capacity = mask.ctypes.data, mask.size
    compute(ctypes.byref(found))
    return values, mask
