"""Sources and targets as structs of t5gemma.h; sizes that C cannot check are checked here."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from typing import Any, Sequence, Union

import numpy as np

from . import _forms, _images
from ._forms import IDS, MASK, Rows, is_array, is_list, shown
from ._images import Images
from ._library import filled

Ids = Union[Sequence[int], Sequence[Sequence[int]], Sequence[np.ndarray], np.ndarray]
"""A row of token ids, rows of token ids of any lengths, or an array of one or two dimensions of any integer type."""

Sources = Union[str, Sequence[str], Ids, Sequence[Mapping[str, Any]]]
"""A text, texts, token ids as above, or a conversation: {"role", "content"} each."""

Targets = Union[str, Sequence[str], Ids]
"""A text, texts, or token ids as above: as many as there are sources."""


class Given:
    """A t5g_sources, and the memory that it points to."""

    def __init__(
        self,
        opened: Any,
        sources: Sources,
        attention_mask: Ids | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_text: str | Sequence[str] | None = None,
        encoder_outputs: np.ndarray | None = None,
        progress_total: int | Sequence[int] | None = None,
        adapter: str | None = None,
        images: Images | None = None,
        pixel_values: np.ndarray | None = None,
        pan_and_scan: bool | None = None,
    ) -> None:
        self._keep: list[Any] = []
        self._given = filled("t5g_sources")
        texts, messages, ids = _told_apart(sources)
        self.rows = 1 if messages is not None else len(texts if texts is not None else ids)
        self._given.rows = self.rows
        if encoder_outputs is not None and ids is None:
            # How long the rows are is told by their tokens.
            ids = [opened.tokenizer.encode(text.decode()) for text in texts or []]
            ids = ids or [opened.tokenizer.encode(opened.chat(sources), target=True)]
            texts = messages = None
        if attention_mask is not None and not (is_array(sources) or is_list(sources) and ids is not None):
            raise ValueError("attention_mask requires token ids as sources")
        if attention_mask is not None:
            ids, mask = _masked(ids, attention_mask, opened)
            self._given.attention_mask, self._given.attention_mask_size = self._kept(mask).ctypes.data, mask.size
        if texts is not None:
            self._given.texts, self._given.text_sizes = self._texts(texts)
        elif messages is not None:
            self._given.messages = self._kept(messages)
        elif isinstance(ids, np.ndarray):
            self._given.input_ids, self._given.input_ids_size = self._kept(ids).ctypes.data, ids.size
            self._given.length = ids.shape[1]
        else:
            self._given.input_ids, self._given.input_ids_size, self._given.lengths = self._ragged(ids)
        if decoder_input_ids is not None and decoder_text is not None:
            raise ValueError("decoder_text cannot be used with decoder_input_ids")
        if decoder_input_ids is not None:
            prompts = self._kept(_rectangle("decoder_input_ids", decoder_input_ids, self.rows))
            self._given.decoder_input_ids = prompts.ctypes.data
            self._given.decoder_rows, self._given.decoder_length = prompts.shape
        if decoder_text is not None:
            self._begin(decoder_text)
        if progress_total is not None:
            totals = self._kept(_totals(progress_total, self.rows))
            self._given.progress_totals, self._given.progress_rows = totals.ctypes.data, totals.size
        if adapter is not None:
            self._given.adapter = self._kept(_forms.plain_name("adapter", adapter))
        if images is not None:
            self._with_images(images)
        if pixel_values is not None:
            if texts is not None or messages is not None:
                raise ValueError("pixel_values requires token ids as sources")
            values = self._kept(_forms.pixels("pixel_values", pixel_values))
            self._given.pixel_values, self._given.pixel_values_size = values.ctypes.data, values.size
        if pan_and_scan is not None:
            self._given.pan_and_scan = 1 if _forms.flag("pan_and_scan", pan_and_scan) else 2
        if encoder_outputs is not None:
            shape = self.rows, max(_forms.lengths(ids)), opened._facts["hidden_size"]
            states = self._kept(_forms.states("encoder_outputs", encoder_outputs, shape))
            self._given.encoder_outputs = states.ctypes.data
            self._given.encoder_rows, self._given.encoder_length, self._given.encoder_width = shape

    def targets(self, targets: Targets, **flags: int) -> Any:
        """A t5g_targets: one for each source."""
        given = filled("t5g_targets", rows=self.rows, **flags)
        is_text = isinstance(targets, str) or is_list(targets) and len(targets) > 0 and isinstance(targets[0], str)
        found = _forms.texts("targets", targets) if is_text else _forms.rows("targets", targets)
        if len(found) != self.rows:
            raise ValueError(f"targets: expected {_counted(self.rows)}, one for each source, found {len(found)}")
        if is_text:
            given.texts, given.text_sizes = self._texts(found)
        else:
            given.target_ids, given.target_ids_size, given.lengths = self._ragged(found)
        return self._kept(given)

    def _begin(self, decoder_text: str | Sequence[str]) -> None:
        texts = _forms.texts("decoder_text", decoder_text)
        if isinstance(decoder_text, str):
            texts *= self.rows
        if len(texts) != self.rows:
            raise ValueError(f"decoder_text: expected {_counted(self.rows)}, one for each source, found {len(texts)}")
        self._given.decoder_texts, self._given.decoder_text_sizes = self._texts(texts)
        self._given.decoder_rows = self.rows

    def _with_images(self, images: Images) -> None:
        rows = _images.rows(images, self.rows)
        found = [image for row in rows for image in row]
        # Never NULL, which would be no images at all: the library then checks that the texts have no places for any.
        count = max(len(found), 1)
        files = self._kept([self._kept(image.data) for image in found])
        pointers = self._kept((ctypes.c_void_p * count)(*(data.ctypes.data for data in files)))
        sizes = self._kept((ctypes.c_size_t * count)(*(data.size for data in files)))
        widths = self._kept((ctypes.c_size_t * count)(*(image.width for image in found)))
        counts = self._kept((ctypes.c_size_t * len(rows))(*map(len, rows)))
        self._given.images, self._given.image_sizes = ctypes.addressof(pointers), ctypes.addressof(sizes)
        self._given.image_widths, self._given.image_counts = ctypes.addressof(widths), ctypes.addressof(counts)
        self._given.images_count = len(found)

    def _texts(self, texts: Sequence[bytes]) -> tuple[int, int]:
        pointers = self._kept((ctypes.c_char_p * len(texts))(*texts))
        sizes = self._kept((ctypes.c_size_t * len(texts))(*map(len, texts)))
        return ctypes.addressof(pointers), ctypes.addressof(sizes)

    def _ragged(self, rows: Rows) -> tuple[int, int, int]:
        ids = self._kept(np.concatenate(list(rows)))
        lengths = self._kept(np.array(_forms.lengths(rows), np.uintp))
        return ids.ctypes.data, ids.size, lengths.ctypes.data

    def _kept(self, value: Any) -> Any:
        self._keep.append(value)
        return value

    @property
    def pointer(self) -> Any:
        return ctypes.byref(self._given)


def _told_apart(sources: Any) -> tuple[list[bytes] | None, bytes | None, Rows | None]:
    """Texts, a conversation, or token ids: at least one row."""
    if isinstance(sources, str):
        return _forms.texts("sources", sources), None, None
    if is_array(sources):
        ids = _forms.rows("sources", sources)
        if not ids.size:
            raise ValueError(f"sources: expected at least one token, found shape {ids.shape}")
        return None, None, ids
    if not is_list(sources):
        remedy = "; list() makes a list of it" if hasattr(sources, "__next__") or isinstance(sources, (set, frozenset)) else ""
        remedy = "; give its input_ids" if isinstance(sources, Mapping) and "input_ids" in sources else remedy
        remedy = "; decode it first" if isinstance(sources, (bytes, bytearray)) else remedy
        expected = "a text, texts, token ids, rows of token ids, or the messages of a conversation"
        raise TypeError(f"sources: expected {expected}, found {shown(sources)}{remedy}")
    if not len(sources):
        raise ValueError(f"sources: expected at least one, found {shown(sources)} of none")
    first = sources[0]
    if isinstance(first, str):
        return _forms.texts("sources", sources), None, None
    if isinstance(first, Mapping):
        return None, messages("sources", sources), None
    if is_list(first) or is_array(first) or _forms.integer(first) is not None:
        return None, None, _forms.rows("sources", sources)
    raise ValueError(f"sources[0]: expected a text, a token id, a row of token ids or a message, found {shown(first)}")


def messages(name: str, given: Any) -> bytes:
    """A conversation as JSON."""
    if not is_list(given):
        raise TypeError(f"{name}: expected a list of messages, found {shown(given)}")
    for at, message in enumerate(given):
        if not isinstance(message, Mapping):
            raise ValueError(f'{name}[{at}]: expected a message, {{"role", "content"}}, found {shown(message)}')
    return json.dumps(_forms.plain(name, given)).encode()


def _masked(ids: Rows, attention_mask: Any, opened: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a mask of the same sizes; shorter rows are padded and the padding masked out."""
    mask = _forms.rows("attention_mask", attention_mask, MASK)
    expected, found = _forms.lengths(ids), _forms.lengths(mask)
    if len(expected) != len(found):
        raise ValueError(f"attention_mask: expected {_counted(len(expected))}, as many as sources, found {len(found)}")
    for at, (length, other) in enumerate(zip(expected, found)):
        if length != other:
            raise ValueError(f"attention_mask[{at}]: expected {length} elements, as sources[{at}] has, found {other}")
    pad = opened._facts["pad_token_id"] or 0
    return _padded(ids, pad), _padded(mask, 0)


def _padded(rows: Rows, fill: int) -> np.ndarray:
    if isinstance(rows, np.ndarray):
        return rows
    padded = np.full((len(rows), max(_forms.lengths(rows))), fill, np.int64)
    for place, row in zip(padded, rows):
        place[: row.size] = row
    return padded


def _rectangle(name: str, value: Any, count: int) -> np.ndarray:
    """As many rows as there are sources, all of one length."""
    rows = _forms.rows(name, value, IDS)
    lengths = _forms.lengths(rows)
    if len(lengths) != count:
        raise ValueError(f"{name}: expected {_counted(count)}, one for each source, found {len(lengths)}")
    for at, length in enumerate(lengths):
        if length != lengths[0]:
            raise ValueError(f"{name}[{at}]: expected {lengths[0]} tokens, as {name}[0] has, found {length}")
    return rows if isinstance(rows, np.ndarray) else np.stack(rows)


def _totals(value: Any, count: int) -> np.ndarray:
    """One length for all sources, or one for each."""
    one = _forms.integer(value)
    totals = np.full(count, one, np.int64) if one is not None else _forms.row("progress_total", value)
    if len(totals) != count:
        raise ValueError(f"progress_total: expected {count}, one for each source, found {len(totals)}")
    return totals


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"
