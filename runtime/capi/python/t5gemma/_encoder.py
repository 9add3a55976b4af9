"""Encoders and classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _forms
from ._calls import Call, Cancellation
from ._images import Images
from ._library import C, call
from ._opened import Opened
from ._results import states
from ._sources import Given, Ids, Sources


class Encoder(Opened):
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
