#!/usr/bin/env python3
"""Compiles graphs with the parser and builder of TensorRT for RTX, which need neither a GPU nor CUDA:
`check_rtx.py EXPORTER FOLDER [--sizes SIZE...] [--capabilities SM...] [--minutes N]`.

Exports into FOLDER, each with a serving plan: the tiny fixtures and Google's sizes with dummy weights, in bfloat16 and
float16, with a growing and a static cache; the fixtures also in fp8; the sizes and the demo also in int4 and fp8, the demo in
int8; encoders and classifiers also in int8 and fp8, an encoder as a conditioner too; a model with a merged adapter. Without
sizes, only two fixtures are exported in float16, and two in fp8. Every graph is parsed, and compiled with its profiles for
the given compute capabilities: SM80, SM89 and SM120 by default. Graphs in fp8 must be refused for SM80, which has no fp8. The
exit status is 1 if another graph is refused, or if the time is over before all are compiled. TensorRT for data centers has
another parser and compiler, closely related to these: it may still refuse a graph that passes here.
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CAPABILITIES = ["SM80", "SM89", "SM120"]
WITHOUT_FP8 = ["SM80"]
TESTS = Path(__file__).resolve().parent.parent
FIXTURES = TESTS / "fixtures/public"
DEMO = TESTS / "demo/checkpoint"
LORA = TESTS / "fixtures/lora"
TASKS = [
    TESTS / "fixtures/tasks/encoder",
    TESTS / "fixtures/tasks/sequence-encoder",
    TESTS / "fixtures/tasks/sequence-decoder",
    TESTS / "fixtures/tasks/token-decoder",
    TESTS / "fixtures/tasks_t5gemma2/sequence",
]
GRAPHS = ["encoder", "decoder", "decoder_with_past", "model", "vision_encoder"]


def load():
    """Imports the bindings, after loading their libraries."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None:
        sys.exit("check_rtx.py: tensorrt_rtx_libs is not installed: run it by `make check-rtx`")
    for name in ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
        ctypes.CDLL(os.path.join(next(iter(found.submodule_search_locations)), name), mode=ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings.tensorrt_rtx as tensorrt

    return tensorrt


def compiled(tensorrt, graph, profile, capabilities):
    """Compiles a graph. Yields the name of each step, its seconds, the bytes of the engine, and error messages."""
    said = []

    class Log(tensorrt.ILogger):
        def __init__(self):
            tensorrt.ILogger.__init__(self)

        def log(self, severity, message):
            if severity <= tensorrt.ILogger.Severity.ERROR:
                said.append(message)

    log = Log()
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    start = time.monotonic()
    parsed = parser.parse_from_file(str(graph))
    errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    varying = {name for name, shape in inputs.items() if -1 in shape}
    if parsed and varying != set(profile):
        errors.append(f"profiles for {sorted(profile)}, needed for {sorted(varying)}")
    yield "parsed", time.monotonic() - start, 0, errors
    if errors or not parsed:
        return
    for capability in capabilities:
        config = builder.create_builder_config()
        spans = builder.create_optimization_profile()
        for name, shapes in profile.items():
            spans.set_shape(name, *[tuple(shape) for shape in shapes])
        config.add_optimization_profile(spans)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(tensorrt.ComputeCapability, capability), 0)
        said.clear()
        start = time.monotonic()
        engine = builder.build_serialized_network(network, config)
        refused = [] if engine is not None else said or ["no engine and no error message"]
        yield capability, time.monotonic() - start, 0 if engine is None else engine.nbytes, refused


@functools.cache
def ranges(exporter, folder, name, source):
    """A file of activation ranges for a model, made once. Their values make no difference to a builder."""
    model, path = folder / "observed", folder / f"{name}-ranges.json"
    shutil.rmtree(model, ignore_errors=True)
    subprocess.run([exporter, "--quiet", "--observe", *source, str(model)], check=True)
    observed = json.loads((model / "manifest.json").read_text())["observed"]
    of_all = {name: 8.0 for names in observed.values() for name in names}
    shutil.rmtree(model)
    path.write_text(json.dumps({"texts": 1, "percentile": 100.0, "ranges": of_all}))
    return path


def exports(sizes, capacity):
    """The exports: a label, the arguments, and for models that compute in 8 bits the name and source of their ranges."""
    for dtype in ("bfloat16", "float16"):
        for cache in ([], ["--cache", f"static={capacity}"]):
            ways = ["--target", "tensorrt", "--dtype", dtype, "--candidates", "8", *cache]
            plan = f"batch=1..4,source=1..64,target={capacity},beams=1..4"
            label = f"{dtype} {'static' if cache else 'growing'}"
            for fixture in sorted(path for path in FIXTURES.iterdir() if (path / "checkpoint").is_dir()):
                # Runs without --sizes must be short, and the types differ by their casts only.
                if not sizes and dtype != "bfloat16" and fixture.name not in ("tiny-balanced", "t2-vision"):
                    continue
                source = (str(fixture / "checkpoint"),)
                yield f"{fixture.name} {label}", [*ways, "--plan", plan, *source], None
                if sizes or fixture.name in ("tiny-balanced", "tiny-unbalanced"):
                    fp8 = [*ways, "--quantize", "fp8", "--plan", plan, *source]
                    yield f"{fixture.name} {label} fp8", fp8, (fixture.name, source)
                if fixture.name == "tiny-balanced" and not cache:
                    merged = [*ways, "--plan", plan, "--adapter", str(LORA / "adapters/dora"), str(LORA / "checkpoint")]
                    yield f"lora {label} merged", merged, None
                if fixture.name == "tiny-unbalanced":
                    aligned = [*ways, "--alignment", "--plan", plan, str(fixture / "checkpoint")]
                    yield f"{fixture.name} {label} aligned", aligned, None
            # Encoders and classifiers have neither a cache nor candidates.
            for folder in TASKS if not cache else []:
                task = folder.name if "t5gemma2" not in folder.parent.name else f"t2-{folder.name}"
                # Runs without --sizes must be short.
                if not sizes and (dtype != "bfloat16" or task == "sequence-encoder"):
                    continue
                source = (str(folder / "checkpoint"),)
                ways_of_task = ["--target", "tensorrt", "--dtype", dtype, "--plan", "batch=1..4,source=1..32"]
                yield f"{task} {dtype}", [*ways_of_task, *source], None
                for bits in ("int8", "fp8") if sizes or task == "encoder" else []:
                    packed = [*ways_of_task, "--quantize", bits, *source]
                    yield f"{task} {dtype} {bits}", packed, (task, source)
                if task == "encoder":
                    conditioner = ["--fixed-length", "32", "--pad-rows", "zero", "--output-dtype", "float16"]
                    fixed = ["--target", "tensorrt", "--dtype", dtype, "--plan", "batch=1..4,source=32"]
                    yield f"{task} {dtype} conditioner", ["--task", "feature-extraction", *fixed, *conditioner, *source], None
            for size in sizes:
                yield f"{size} {label}", [*ways, "--plan", plan, "--dummy-weights", "--preset", size], None
            # The types differ by their casts only.
            if cache and (sizes or dtype == "bfloat16"):
                for bits in ("int8", "fp8", "int4"):
                    packed = [*ways, "--quantize", bits, "--plan", plan]
                    known = None if bits == "int4" else ("demo", (str(DEMO),))
                    yield f"demo {label} {bits}", [*packed, str(DEMO)], known
                    for size in sizes if bits != "int8" else []:
                        source = ("--dummy-weights", "--preset", size)
                        known = None if bits == "int4" else (size, source)
                        yield f"{size} {label} {bits}", [*packed, *source], known


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("exporter")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--sizes", nargs="*", default=["s-s"])
    arguments.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    arguments.add_argument("--only", default="", help="exports whose label has this text")
    arguments.add_argument("--minutes", type=float, default=60)
    given = arguments.parse_args()
    tensorrt = load()
    deadline = time.monotonic() + given.minutes * 60
    given.folder.mkdir(parents=True, exist_ok=True)
    refused = rightly = engines = 0
    # Fixtures of the same sizes have the same graphs and differ only in their weights.
    known = set()
    for label, how, observed in exports(given.sizes, 64):
        if given.only not in label:
            continue
        if observed:
            how = ["--calibrate", str(ranges(given.exporter, given.folder, *observed)), *how]
        out = given.folder / label.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run([given.exporter, "--quiet", *how, str(out)], check=True)
        manifest = json.loads((out / "manifest.json").read_text())
        profiles = json.loads((out / "profiles.json").read_text())
        of_fp8 = {tensor["name"] for tensor in manifest["weights"]["tensors"] if tensor["dtype"] == "float8e4m3fn"}
        assert bool(of_fp8) == label.endswith(" fp8"), label
        for part in [manifest["graphs"][name] for name in GRAPHS if name in manifest["graphs"]]:
            graph = out / part["file"]
            name = graph.stem
            shape = (name, manifest["dtype"], hash(graph.read_bytes()))
            if shape in known:
                continue
            known.add(shape)
            if time.monotonic() > deadline:
                sys.exit(f"check_rtx.py: {given.minutes} minutes are over, before {label} {name}")
            in_fp8 = not of_fp8.isdisjoint(part["weights"])
            for step, seconds, size, wrong in compiled(tensorrt, graph, profiles[graph.name], given.capabilities):
                verdict = "REFUSED" if wrong else "ok"
                if in_fp8 and step in WITHOUT_FP8:
                    if len(wrong) == 1 and "datatypes: fp8" in wrong[0]:
                        print(f"no fp8  {label:<36} {name:<24} {step:<7}{seconds:>7.1f} s", flush=True)
                        rightly += 1
                        continue
                    wrong = wrong or ["expected an error for fp8, but it was compiled"]
                    verdict = "WRONG"
                print(f"{verdict:<8}{label:<36} {name:<24} {step:<7}{seconds:>7.1f} s{size / 1e6:>9.1f} MB", flush=True)
                for line in wrong:
                    print("   ", line)
                refused += bool(wrong)
                engines += not wrong and step != "parsed"
        shutil.rmtree(out)
    print(f"{engines} engines compiled, {refused} refused, {rightly} more as they have no fp8")
    sys.exit(refused > 0 or engines == 0)


main()
