"""The accepted forms of arguments, recognized in one place for every function.

Texts and token ids (`sources`, `targets`, `decoder_text`, `decoder_input_ids`, `tokens`), as in the lines of
`t5gemma generate --jsonl`:

    "a text"                              one row
    ["a text", "another"]                 one row each
    [5, 6, 7]                             one row of token ids
    [[5, 6, 7], [8]]                      one row each, of any lengths
    np.array([5, 6, 7])                   one row
    np.array([[5, 6], [7, 8]])            one row each
    [{"role": "user", "content": "..."}]  one row: a conversation (`sources` only)

A list may be any sequence. An array may have any integer type, byte order and strides, and may be any object that numpy
converts to such an array. `attention_mask` has the form of its ids, and may be bool. Everything else is refused: a
TypeError names an argument of the wrong type, a ValueError a wrong element or size.
"""

from __future__ import annotations

import array
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, Union

import numpy as np

INT64 = np.iinfo(np.int64)


class Elements(NamedTuple):
    """The elements of rows: their description, and the kinds of numpy types."""

    one: str
    many: str
    kinds: str


IDS = Elements("a token id", "token ids", "iu")
MASK = Elements("0 or 1", "zeros and ones", "iub")

Rows = Union[np.ndarray, "list[np.ndarray]"]
"""int64: [rows, length], or a list of rows."""


def shown(value: Any) -> str:
    """A value for a message: itself if it is short, else its type."""
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    if isinstance(value, (np.ndarray, np.generic)):
        return f"an array of {value.dtype} with shape {value.shape}"
    return type(value).__name__


def is_list(value: Any) -> bool:
    """Whether the value is a sequence, but not a string, bytes or an array."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview, array.array))


def is_array(value: Any) -> bool:
    """Whether numpy converts the value to an array of at least one dimension."""
    if isinstance(value, (array.array, np.ndarray)):
        return isinstance(value, array.array) or value.ndim > 0
    is_one = hasattr(value, "__array__") or hasattr(value, "__array_interface__")
    return is_one and not isinstance(value, type) and getattr(value, "ndim", 1) != 0


def is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


# Texts and paths


def utf8(name: str, text: Any) -> bytes:
    """A string as UTF-8."""
    if not isinstance(text, str):
        remedy = " (decode it first)" if isinstance(text, (bytes, bytearray)) else ""
        raise TypeError(f"{name}: expected a text, found {shown(text)}{remedy}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {text[error.start]!a} at {error.start}"
        raise ValueError(f"{name}: expected text that can be written as UTF-8, found {found}") from None


def plain_name(name: str, text: Any) -> bytes:
    """A text as UTF-8, without the zero that ends texts in C."""
    encoded = utf8(name, text)
    if 0 in encoded:
        raise ValueError(f"{name}: expected no zero character, found one at {encoded.index(0)}")
    return encoded


def path(name: str, value: Any) -> bytes:
    """A path as UTF-8."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = value
    if not isinstance(text, str):
        remedy = " (os.fsdecode makes a str of it)" if isinstance(text, bytes) else ""
        raise TypeError(f"{name}: expected str or os.PathLike, found {shown(value)}{remedy}")
    return plain_name(name, text)


def texts(name: str, value: Any) -> list[bytes]:
    """A text, or a list of texts."""
    if isinstance(value, str):
        return [utf8(name, value)]
    if not is_list(value):
        raise TypeError(f"{name}: expected a text or a list of texts, found {shown(value)}")
    for at, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{at}]: expected a text, found {shown(text)}")
    return [utf8(f"{name}[{at}]", text) for at, text in enumerate(value)]


# Numbers


def integer(value: Any) -> int | None:
    """The value as an int if it is an integer of Python, numpy or another library, but not a bool."""
    try:
        return None if is_bool(value) else operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, least: int = INT64.min + 1, most: int = INT64.max) -> int:
    """An integer within bounds."""
    number = integer(value)
    if number is None:
        raise TypeError(f"{name}: expected an integer, found {shown(value)}")
    if not least <= number <= most:
        expected = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name}: expected {expected}, found {shown(number)}")
    return number


def flag(name: str, value: Any) -> int:
    """True or False, as 1 or 0."""
    if is_bool(value) or (isinstance(value, Integral) and value in (0, 1)):
        return int(value)
    raise TypeError(f"{name}: expected True or False, found {shown(value)}")


def choice(name: str, value: Any, names: Sequence[str]) -> int:
    """The index of a name."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}, found {shown(value)}")
    return names.index(value)


def seconds(name: str, value: Any) -> float:
    """Seconds from now; negative if the time has passed, infinite for no limit."""
    if is_bool(value) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected seconds from now as a number, or None, found {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if math.isnan(number):
        raise ValueError(f"{name}: expected seconds from now, or None, found nan")
    return number


# Rows of integers


def row(name: str, value: Any, elements: Elements = IDS) -> np.ndarray:
    """One row, as int64."""
    if is_array(value):
        found = _array(name, value, elements)
        if found.ndim != 1:
            raise ValueError(f"{name}: expected one row of {elements.many}, found shape {found.shape}")
        return found
    if not is_list(value):
        raise TypeError(f"{name}: expected a row of {elements.many}, found {shown(value)}")
    if not all(type(element) is int for element in value):
        value = [_element(f"{name}[{at}]", element, elements) for at, element in enumerate(value)]
    try:
        return np.array(value, np.int64)
    except OverflowError:
        at = next(at for at, element in enumerate(value) if not INT64.min <= element <= INT64.max)
        raise ValueError(f"{name}[{at}]: expected {elements.one}, found {shown(value[at])}") from None


def rows(name: str, value: Any, elements: Elements = IDS) -> Rows:
    """One row, or several."""
    if is_array(value):
        found = _array(name, value, elements)
        if found.ndim not in (1, 2):
            expected = f"{elements.many} of shape [length] or [rows, length]"
            raise ValueError(f"{name}: expected {expected}, found shape {found.shape}")
        return np.atleast_2d(found)
    if not is_list(value):
        raise TypeError(f"{name}: expected {elements.many}, found {shown(value)}")
    if not len(value):
        return []
    if not (is_list(value[0]) or is_array(value[0])):
        return [row(name, value, elements)]
    for at, found in enumerate(value):
        if not (is_list(found) or is_array(found)):
            raise ValueError(f"{name}[{at}]: expected a row of {elements.many}, found {shown(found)}")
    return [row(f"{name}[{at}]", found, elements) for at, found in enumerate(value)]


def lengths(found: Rows) -> list[int]:
    """The length of each row."""
    return [found.shape[1]] * found.shape[0] if isinstance(found, np.ndarray) else [row.size for row in found]


def _element(name: str, value: Any, elements: Elements) -> int:
    if is_bool(value) and "b" in elements.kinds:
        return int(value)
    number = integer(value)
    if number is None:
        raise ValueError(f"{name}: expected {elements.one} (an integer), found {shown(value)}")
    return number


def _array(name: str, value: Any, elements: Elements) -> np.ndarray:
    found = _read(name, value)
    if found.dtype.kind not in elements.kinds:
        remedy = " (.tolist() makes a list of it)" if found.dtype.kind in "OUT" else ""
        raise ValueError(f"{name}: expected int64 {elements.many}, found {found.dtype}{remedy}")
    if found.dtype.kind == "u" and found.size and found.max() > INT64.max:
        raise ValueError(f"{name}: expected int64 {elements.many}, found {found.max()}")
    return np.ascontiguousarray(found, np.int64)


def _read(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(f"{name}: expected an array without masked elements, found some (use .filled() and attention_mask)")
    try:
        return np.asarray(value)
    except Exception as error:  # any exception of the object's own conversion
        raise ValueError(f"{name}: expected an object that numpy converts to an array, found {type(value).__name__}: {error}") from error


def states(name: str, value: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Floating-point numbers of the given shape, as float32."""
    if not is_array(value):
        raise TypeError(f"{name}: expected an array of float32, found {shown(value)}")
    found = _read(name, value)
    if found.dtype.kind != "f":
        raise ValueError(f"{name}: expected float32, found {found.dtype}")
    if found.shape != shape:
        raise ValueError(f"{name}: expected [rows, length, hidden_size], here {shape}, found shape {found.shape}")
    return np.ascontiguousarray(found, np.float32)


def pixels(name: str, value: Any) -> np.ndarray:
    """Floating-point numbers [images, 3, image_size, image_size], as float32."""
    if not is_array(value):
        raise TypeError(f"{name}: expected an array of float32, found {shown(value)}")
    found = _read(name, value)
    if found.dtype.kind != "f":
        raise ValueError(f"{name}: expected float32, found {found.dtype}")
    if found.ndim != 4 or found.shape[1] != 3 or found.shape[2] != found.shape[3] or not found.size:
        raise ValueError(f"{name}: expected [images, 3, image_size, image_size], found shape {found.shape}")
    return np.ascontiguousarray(found, np.float32)


# Options


def plain(name: str, value: Any) -> Any:
    """A value as JSON: None, bool, number, string, and lists and objects of these."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, str):
        utf8(name, value)
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{name}: expected a finite number, found {number}")
        return number
    if isinstance(value, (array.array, np.ndarray)) or hasattr(value, "__array__") and not isinstance(value, type):
        found = _read(name, value)
        if found.dtype.kind not in "biufU":
            raise TypeError(f"{name}: expected an array of numbers, found {found.dtype}")
        return plain(name, found.tolist())
    if isinstance(value, Mapping):
        # sequence_bias in the form of transformers: JSON objects cannot have lists as keys.
        if value and all(isinstance(key, tuple) for key in value):
            return [[plain(name, key), plain(f"{name}[{key}]", bias)] for key, bias in value.items()]
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name}: expected texts as keys, found {shown(key)}")
        return {key: plain(f"{name}[{utf8(name, key).decode()!r}]", given) for key, given in value.items()}
    if is_list(value):
        return [plain(f"{name}[{at}]", given) for at, given in enumerate(value)]
    if isinstance(value, (bytes, bytearray, memoryview)):
        remedy = " (decode it first)"
    elif isinstance(value, os.PathLike):
        remedy = " (str() makes a text of it)"
    elif isinstance(value, Iterable):
        remedy = " (list() makes a list of it)"
    else:
        remedy = ""
    raise TypeError(f"{name}: expected numbers, texts, True or False, or lists of them, found {shown(value)}{remedy}")


def plain_paths(name: str, value: Any) -> Any:
    """`plain`, for options that may be paths."""
    if isinstance(value, os.PathLike):
        return path(name, value).decode()
    if isinstance(value, Mapping):
        value = {key: plain_paths(f"{name}[{key!r}]", given) for key, given in value.items()}
    return plain(name, value)
