"""What models and encoders have in common: they are opened from a folder, again after pickling, and have a tokenizer."""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any, Mapping, Sequence, TypeVar

import numpy as np

from . import _calls, _forms
from ._calls import copied
from ._library import C, Handle, Owner, call, filled, take_text


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


O = TypeVar("O", bound="Opened")


class Opened(Owner):
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
