#!/usr/bin/env python3
"""Compiles graphs with NVIDIA's own parser and builder, those of TensorRT for RTX, which need neither GPU nor CUDA:
`check_rtx.py EXPORTER FOLDER [--sizes SIZE...] [--minutes N]`.

FOLDER is for the models: those of the tiny fixtures and of dummy weights in Google's sizes, in bfloat16 and float16, with a
cache that grows and with one of a capacity, the sizes and the demo also with weights of 4 bits, and the demo in 8 bits, each
with a serving plan whose profiles are used. Every graph is parsed, and compiled for SM80, SM89 and SM120. Exit status 1 if
one is refused, or if the time is over before all are compiled. It is not the TensorRT of data centres, whose parser and
compiler are close relatives: what this takes, that may still refuse.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CAPABILITIES = ["SM80", "SM89", "SM120"]
TESTS = Path(__file__).resolve().parent.parent
FIXTURES = TESTS / "fixtures/public"
DEMO = TESTS / "demo/checkpoint"
GRAPHS = ["encoder_model", "decoder_model", "decoder_with_past_model"]


def load():
    """The bindings, which want their libraries loaded."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None:
        sys.exit("check_rtx.py: tensorrt_rtx_libs is not installed: run it by `make check-rtx`")
    for name in ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
        ctypes.CDLL(os.path.join(next(iter(found.submodule_search_locations)), name), mode=ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings.tensorrt_rtx as tensorrt

    return tensorrt


def compiled(tensorrt, graph, profile):
    """Yields what each step of compiling a graph came to: the step, seconds, bytes and what was said."""
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
    for capability in CAPABILITIES:
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
        refused = [] if engine is not None else said or ["no engine, and nothing was said"]
        yield capability, time.monotonic() - start, 0 if engine is None else engine.nbytes, refused


def ranges(exporter, folder):
    """A file of ranges for the demo: which they are makes no difference to a builder."""
    model, path = folder / "observed", folder / "ranges.json"
    shutil.rmtree(model, ignore_errors=True)
    subprocess.run([exporter, "--quiet", "--observe", str(DEMO), str(model)], check=True)
    observed = json.loads((model / "manifest.json").read_text())["observed"]
    of_all = {name: 8.0 for names in observed.values() for name in names}
    path.write_text(json.dumps({"texts": 1, "percentile": 100.0, "ranges": of_all}))
    shutil.rmtree(model)
    return path


def exports(sizes, capacity, ranges):
    """What to export: a label, and the arguments for it."""
    for dtype in ("bfloat16", "float16"):
        for cache in ([], ["--cache", f"static={capacity}"]):
            ways = ["--target", "tensorrt", "--dtype", dtype, "--candidates", "8", *cache]
            plan = f"batch=1..4,source=1..64,target={capacity},beams=1..4"
            label = f"{dtype} {'static' if cache else 'growing'}"
            for fixture in sorted(path for path in FIXTURES.iterdir() if (path / "checkpoint").is_dir()):
                yield f"{fixture.name} {label}", [*ways, "--plan", plan, str(fixture / "checkpoint")]
                if fixture.name == "tiny-unbalanced":
                    aligned = [*ways, "--alignment", "--plan", plan, str(fixture / "checkpoint")]
                    yield f"{fixture.name} {label} aligned", aligned
            for size in sizes:
                yield f"{size} {label}", [*ways, "--plan", plan, "--dummy-weights", "--preset", size]
            # Without sizes there is little time, and the types differ by their casts only.
            if cache and (sizes or dtype == "bfloat16"):
                int8 = ["--quantize", "int8", "--calibrate", str(ranges)]
                yield f"demo {label} int8", [*ways, *int8, "--plan", plan, str(DEMO)]
                ways = [*ways, "--quantize", "int4", "--plan", plan]
                yield f"demo {label} int4", [*ways, str(DEMO)]
                for size in sizes:
                    yield f"{size} {label} int4", [*ways, "--dummy-weights", "--preset", size]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("exporter")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--sizes", nargs="*", default=["s-s"])
    arguments.add_argument("--only", default="", help="exports whose label has this text")
    arguments.add_argument("--minutes", type=float, default=60)
    given = arguments.parse_args()
    tensorrt = load()
    deadline = time.monotonic() + given.minutes * 60
    given.folder.mkdir(parents=True, exist_ok=True)
    refused = engines = 0
    # Fixtures of one shape give one graph: what differs is in their weights only.
    known = set()
    for label, how in exports(given.sizes, 64, ranges(given.exporter, given.folder)):
        if given.only not in label:
            continue
        out = given.folder / label.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run([given.exporter, "--quiet", *how, str(out)], check=True)
        manifest = json.loads((out / "manifest.json").read_text())
        profiles = json.loads((out / "profiles.json").read_text())
        for name in GRAPHS:
            graph = out / f"{name}.onnx"
            shape = (name, manifest["dtype"], hash(graph.read_bytes()))
            if shape in known:
                continue
            known.add(shape)
            if time.monotonic() > deadline:
                sys.exit(f"check_rtx.py: {given.minutes} minutes are over, before {label} {name}")
            for step, seconds, size, wrong in compiled(tensorrt, graph, profiles[graph.name]):
                verdict = "REFUSED" if wrong else "ok"
                print(f"{verdict:<8}{label:<36} {name:<24} {step:<7}{seconds:>7.1f} s{size / 1e6:>9.1f} MB", flush=True)
                for line in wrong:
                    print("   ", line)
                refused += bool(wrong)
                engines += not wrong and step != "parsed"
        shutil.rmtree(out)
    print(f"{engines} engines compiled, {refused} refused")
    sys.exit(refused > 0 or engines == 0)


main()
