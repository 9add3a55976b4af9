"""Models: one call for one batch."""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from . import _calls, _forms
from ._calls import Call, Cancellation
from ._images import Images
from ._library import C, Handle, call, filled, take_text
from ._opened import Opened
from ._results import Hypothesis, result, states, taken
from ._sources import Given, Ids, Sources, Targets, messages as messages_of


class Model(Opened):
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
        wanted, handle = generation_options(options), self._handle
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
        wanted, handle = generation_options(options), self._handle
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


def generation_options(options: dict[str, Any]) -> Any:
    """A t5g_generation_options."""
    plain = {name: _forms.plain(name, value) for name, value in options.items()}
    return ctypes.byref(filled("t5g_generation_options", json=json.dumps(plain).encode()))
