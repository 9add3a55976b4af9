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
not finished by then fails with T5G_ERROR_DEADLINE. In an event loop, `await engine.future(…)` and iterate over
`engine.stream(…)`.

Copying or unpickling a Model, an Encoder or a Tokenizer opens it again. After a fork, the child can use those of its
parent if no call and no engine was running at the fork; it has to make its own engines and requests.
"""

from __future__ import annotations

import json
import os
from typing import Any

from . import _forms
from ._calls import Cancellation
from ._encoder import Encoder
from ._engine import Engine, Request
from ._futures import Future
from ._library import C, Error, take_text
from ._model import Model
from ._opened import Tokenizer
from ._results import Hypothesis
from ._streams import Stream

__all__ = [
    "Cancellation",
    "Encoder",
    "Engine",
    "Error",
    "Future",
    "Hypothesis",
    "Model",
    "Request",
    "Stream",
    "Tokenizer",
    "onnxruntime_report",
    "version",
]

# Tracebacks and pickles name the public module.
for _public in (Cancellation, Encoder, Engine, Error, Future, Hypothesis, Model, Request, Stream, Tokenizer):
    _public.__module__ = __name__


def version() -> str:
    """The library's version."""
    return C.t5g_version().decode()


def onnxruntime_report(library: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Where ONNX Runtime was searched for, and which library is used."""
    return json.loads(take_text(C.t5g_onnxruntime_report, None if library is None else _forms.path("library", library)))
