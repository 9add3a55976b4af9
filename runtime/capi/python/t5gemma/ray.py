"""T5Gemma on Ray clusters: `pip install t5gemma[ray]`.

`run_shards` computes files of documents with the program `t5gemma batch`, and `Deployment` serves a model with Ray Serve:

    import t5gemma.ray
    from ray import serve

    report = t5gemma.ray.run_shards("in/*.jsonl", "out", model="model", num_cpus=4)
    serve.run(t5gemma.ray.Deployment.options(max_ongoing_requests=64).bind("model"))

Models, inputs and outputs are paths that every node of the cluster sees; inputs and outputs may be s3:// URLs, with the variables AWS_… in
the environment of the nodes.
"""

from __future__ import annotations

import collections
from dataclasses import replace
from typing import Any, Callable, Iterable, Sequence

import ray

from . import _forms
from ._shards import ArgumentsRefused, Path, ProgramKilled, ProgramNotFound, Report, Shard, compute, place, shards, threads

__all__ = ["ArgumentsRefused", "Deployment", "ProgramNotFound", "Report", "Shard", "run_shards"]

UNDER_WAY = 10_000
"""Tasks that Ray knows at a time."""


def run_shards(
    inputs: Path | Iterable[Path],
    output: Path,
    *,
    model: Path,
    arguments: Sequence[str] = (),
    program: Path | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    concurrency: int | None = None,
    retries: int = 3,
    on_shard: Callable[[Shard], None] | None = None,
    **task_options: Any,
) -> Report:
    """Computes each input with `t5gemma batch MODEL --input FILE --output DIR`, in tasks of the Ray cluster.

    `inputs` are a glob pattern of files, or paths and URLs, whose names must differ: an output has the name of its input. `arguments` are further ones
    of the program, such as `["--max-new-tokens", "64"]`. A task has `num_cpus` and `num_gpus`, and the program as many threads as
    CPUs, unless `arguments` say otherwise. `concurrency` bounds the shards that are computed at a time.

    A shard whose worker, node or program is killed is begun again, up to `retries` times. One that the program cannot compute has
    failed at once; the others go on. Arguments that the program does not take raise ArgumentsRefused. `on_shard` is called with each shard when it ends. `task_options` are others of Ray's, such as
    `runtime_env` and `scheduling_strategy`.

    Every node needs this package and the program: `program`, or else what the variable T5GEMMA_PROGRAM of its environment names,
    or else `t5gemma` in its PATH. ProgramNotFound is raised for a node without.
    """
    found = shards(inputs, place("output", output))
    given = [place("model", model), *threads(num_cpus, arguments), *arguments]
    named = None if program is None else place("program", program)
    task = ray.remote(compute).options(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_retries=_forms.whole("retries", retries, 0),
        retry_exceptions=[ProgramKilled],
        **task_options,
    )
    most = UNDER_WAY if concurrency is None else _forms.whole("concurrency", concurrency, 1)
    ended: dict[str, Shard] = {}
    waiting = collections.deque(found)
    under_way: dict[Any, Shard] = {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < most:
                shard = waiting.popleft()
                under_way[task.remote(named, given, shard)] = shard
            ray.wait(list(under_way), num_returns=1)
            ready, _ = ray.wait(list(under_way), num_returns=len(under_way), timeout=0)
            for reference in ready:
                shard = under_way.pop(reference)
                ended[shard.input] = end = _end(shard, reference)
                if on_shard is not None:
                    on_shard(end)
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)
    return Report([ended[shard.input] for shard in found])


def _end(shard: Shard, reference: Any) -> Shard:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (ArgumentsRefused, ProgramNotFound)):
            raise error.cause from None
        return replace(shard, message=str(error.cause))
    except ray.exceptions.RayError as error:  # The worker or its node was lost in every attempt.
        return replace(shard, message=str(error).strip())


def __getattr__(name: str) -> Any:
    # Ray Serve takes seconds to import, and needs packages that Ray alone does not.
    if name == "Deployment":
        from ._ray_serve import Deployment

        return Deployment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
