"""The deployment of t5gemma.ray for Ray Serve.

A request is one of the JSON lines of `t5gemma generate --jsonl`, and so is the answer, as with `POST /v1/t5gemma` of
`t5gemma serve`. Requests of a replica share the steps of its engine.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
from typing import Any, AsyncIterator, Iterator, Mapping

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from . import _forms
from ._engine import Engine
from ._library import C, Error, take_text
from ._model import Model
from ._results import Hypothesis
from ._streams import Stream

STATUS = {
    "ARGUMENT": 400,
    "TOKENIZER": 400,
    "INPUT": 400,
    "OPTIONS": 400,
    "CONSTRAINT": 400,
    "TOO_LARGE": 400,
    "FULL": 429,
    "CANCELLED": 499,
    "UNSUPPORTED": 501,
    "CLOSED": 503,
    "DEADLINE": 504,
}
"""The HTTP status of T5G_ERROR_…; of others it is 500."""
STATUS_OF_CODE = {C.constants[f"T5G_ERROR_{name}"]: status for name, status in STATUS.items()}

BROKEN = [C.constants["T5G_ERROR_INTERNAL"], C.constants["T5G_ERROR_CLOSED"]]
"""After these, an engine answers nothing any more."""

SOURCES = ("text", "messages", "input_ids")
ARGUMENTS = frozenset(inspect.signature(Engine.stream).parameters) - {"options"}
FIELDS = ("attention_mask", "decoder_text", "decoder_input_ids", "progress_total", "pan_and_scan")


@serve.deployment(
    name="t5gemma",
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 32},
    max_ongoing_requests=128,
    max_queued_requests=512,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    ray_actor_options={"num_cpus": 1},
)
class Deployment:
    """A model with an engine of its own in each replica.

    `engine` are arguments of Engine, `adapters` those of Model.load_adapter by name, and the others are arguments of
    Model.open. A replica computes with as many threads as it has CPUs, unless `threads` says otherwise.
    """

    def __init__(
        self, model: str, *, engine: Mapping[str, Any] = {}, adapters: Mapping[str, str] = {}, **options: Any
    ) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        options.setdefault("threads", max(1, math.floor(cpus)))
        self._model = Model.open(model, **options)
        for name, folder in adapters.items():
            self._model.load_adapter(name, folder)
        self._model.warm_up()
        self._engine = Engine(self._model, **engine)
        self._broken: Error | None = None

    def check_health(self) -> None:
        """Raises an error if the engine has ended, so that Serve replaces the replica."""
        if self._broken is not None:
            raise self._broken

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Notices an engine that has ended."""
        try:
            yield
        except Error as error:
            if error.code in BROKEN:
                self._broken = copy.copy(error)
            raise

    def stats(self) -> dict[str, Any]:
        """The engine's counts, for handles."""
        return self._engine.stats

    async def generate(self, sources: Any, **options: Any) -> list[list[Hypothesis]]:
        """For handles of other deployments: what Model.generate returns, with the arguments of Engine.future."""
        with self._watched():
            return await self._engine.future(sources, **options)

    async def stream(self, source: Any, **options: Any) -> AsyncIterator[str]:
        """For handles with stream=True: the pieces of the text, with the arguments of Engine.stream."""
        with self._watched():
            async for piece in self._engine.stream(source, **options):
                yield piece

    async def __call__(self, request: Request) -> Response:
        """Answers over HTTP; with `Accept: text/event-stream` as server-sent events: the text as it comes, then the result."""
        try:
            identity, arguments = _read(await request.body())
            with self._watched():
                stream = self._engine.stream(**arguments)
                if "text/event-stream" in request.headers.get("accept", ""):
                    return StreamingResponse(self._events(stream, identity), media_type="text/event-stream")
                return Response(await _result(stream, identity), media_type="application/json")
        except (Error, TypeError, ValueError) as error:
            return _refusal(error)

    async def _events(self, stream: Stream, identity: dict[str, Any]) -> AsyncIterator[str]:
        # A client that leaves cancels the task, and with it the stream.
        try:
            with self._watched():
                async for piece in stream:
                    yield f"data: {json.dumps({'text': piece}, ensure_ascii=False)}\n\n"
                yield f"data: {await _result(stream, identity)}\n\n"
        except Error as error:
            yield f"data: {json.dumps({'error': str(error)}, ensure_ascii=False)}\n\n"
        finally:
            stream.cancel()


def _read(body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The id of a request, and its arguments of Engine.stream."""
    asked = json.loads(body)
    if not isinstance(asked, Mapping):
        raise ValueError(f"expected a JSON object, found {_forms.shown(asked)}")
    fields = dict(asked)
    named = [name for name in SOURCES if name in fields]
    if len(named) != 1:
        raise ValueError(f"expected one of {', '.join(SOURCES)}, found {' and '.join(named) or 'none'}")
    options = fields.pop("options", {})
    if not isinstance(options, Mapping):
        raise ValueError(f"options: expected an object, found {_forms.shown(options)}")
    identity = {"id": fields.pop("id")} if "id" in fields else {}
    arguments = {"source": fields.pop(named[0])}
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"{name}: unknown field")
    for name in options:
        if name in ARGUMENTS:
            raise ValueError(f"options.{name}: unknown generation option")
    return identity, {**arguments, **fields, **options}


async def _result(stream: Stream, identity: dict[str, Any]) -> str:
    text = take_text(C.t5g_result_json, (await stream._ended()).number)
    return json.dumps({**identity, **json.loads(text)}, ensure_ascii=False, separators=(",", ":"))


def _refusal(error: Exception) -> Response:
    headers, status = {}, 400
    if isinstance(error, Error):
        status = STATUS_OF_CODE.get(error.code, 500)
        if status == 429:
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    body = json.dumps({"error": str(error)}, ensure_ascii=False)
    return Response(body, status_code=status, headers=headers, media_type="application/json")
