#!/usr/bin/env python3
"""Draws the book's charts and writes its tables: `generate.py [--check] [--programs DIR]`.

Charts (src/images/*.svg) and tables of measurements come from results/*.json, tables of JSON fields from the JSON Schemas in
../runtime/protocol/schema. Tables stand in src/*.md and ../README.md between `<!-- table NAME -->` and `<!-- end -->`. With
--programs, src/all-options.md is what the programs in DIR print for `--help`. With --check, writes nothing and fails if a file is
not what this script would write. Standard library only; the same input gives the same bytes.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
from html import escape

import plan

DOCS = pathlib.Path(__file__).resolve().parent
NAMES = {"t5gemma": "t5gemma", "onnxruntime": "ONNX Runtime", "ctranslate2": "CTranslate2"}

# By role, for a light and a dark page: an SVG that is shown as an image follows the reader's system, not the page.
COLOURS = {
    "panel": ("#ffffff", "#161b22"),
    "text": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9198a1"),
    "grid": ("#d1d9e0", "#3d444d"),
    "tint": ("#f1f4f8", "#21262d"),
    "on": ("#ffffff", "#0d1117"),
    "a": ("#2563c9", "#5b9bff"),
    "b": ("#d98324", "#e39b4a"),
    "c": ("#7a8794", "#8b98a5"),
    "d": ("#8db4f2", "#31598f"),
}


def rules(shade):
    """The style sheet of one shade."""
    colour = {role: shades[shade] for role, shades in COLOURS.items()}
    fills = [f".{role} {{ fill: {colour[role]} }}" for role in "abcd"]
    return "\n".join([
        f"text {{ fill: {colour['text']} }} text.faint {{ fill: {colour['faint']} }} text.on {{ fill: {colour['on']} }}",
        f".back {{ fill: {colour['panel']} }} .panel {{ fill: {colour['panel']}; stroke: {colour['grid']} }} .tint {{ fill: {colour['tint']}; stroke: {colour['faint']} }}",
        f".grid {{ stroke: {colour['grid']} }} .line {{ stroke: {colour['faint']} }}",
        " ".join(fills),
    ])


STYLE = f"""
text {{ font-family: 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif; font-size: 13px }}
.title {{ font-size: 15px; font-weight: 600 }} .faint {{ font-size: 12px }}
{rules(0)}
@media (prefers-color-scheme: dark) {{
{rules(1)}
}}
"""


class Drawing:
    """An SVG on a panel of its own, so that it can be read on any page."""

    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def text(self, x, y, text, kind="", anchor="start"):
        kind = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{kind} text-anchor="{anchor}">{escape(str(text))}</text>')

    def rect(self, x, y, width, height, kind, radius=2):
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="{radius}" class="{kind}"/>'
        )

    def line(self, x1, y1, x2, y2, kind="grid"):
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>')

    def arrow(self, x1, y1, x2, y2):
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" class="line" marker-end="url(#arrow)"/>')

    def svg(self):
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" class="c"/></marker></defs>\n'
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-label="{escape(self.title)}">\n<style>{STYLE}</style>\n'
            f"{arrow if 'arrow' in body else ''}"
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" class="panel"/>\n{body}\n</svg>\n'
        )


def legend(drawing, x, y, entries):
    """Colours and what they stand for, in a row."""
    for kind, name in entries:
        drawing.rect(x, y - 10, 12, 12, kind)
        drawing.text(x + 18, y, name)
        x += 18 + 7.4 * len(name) + 22


def speed(results, title):
    """Times relative to t5gemma's: a panel for float32 and one for 8 bits, the same cases in both."""
    cases = [case for case in results["cases"] if case["unit"] == "ms"]
    types = [("float32", "float32"), ("int8", "int8 (t5gemma also int4)")]
    most = {
        name: max(t / case[name]["t5gemma"] for case in cases for t in case[name].values() if t is not None)
        for name, _ in types
    }
    left, bar, gap, panel, top = 252, 14, 14, 250, 84
    rows = {"float32": ["t5gemma", "onnxruntime", "ctranslate2"], "int8": ["t5gemma", "int4", "onnxruntime", "ctranslate2"]}
    kinds = {"t5gemma": "a", "int4": "d", "onnxruntime": "b", "ctranslate2": "c"}
    height = 4 * bar + gap
    drawing = Drawing(left + 2 * (panel + 70) + 14, top + len(cases) * height + 54, title)
    drawing.text(20, 30, title, "title")
    legend(drawing, 20, 54, [("a", "t5gemma"), ("d", "t5gemma int4"), ("b", "ONNX Runtime"), ("c", "CTranslate2")])
    for column, (name, label) in enumerate(types):
        x0 = left + column * (panel + 70)
        scale = panel / max(most.values())
        drawing.text(x0, top - 8, label, "faint")
        bottom = top + len(cases) * height
        for tick in range(0, int(max(most.values())) + 1):
            drawing.line(x0 + tick * scale, top, x0 + tick * scale, bottom - gap + 4)
            drawing.text(x0 + tick * scale, bottom + 8, f"{tick}×", "faint", "middle")
        for at, case in enumerate(cases):
            y = top + at * height + 2
            if column == 0:
                drawing.text(left - 12, y + 2 * bar, case["case"], "", "end")
            own, shown = case[name]["t5gemma"], [row for row in rows[name]]
            y += (4 - len(shown)) * bar / 2
            for row in shown:
                time = case["int4"]["t5gemma"] if row == "int4" else case[name].get(row)
                if time is None:
                    drawing.text(x0 + 4, y + bar - 3, "not measured", "faint") if row == "t5gemma" else None
                elif own is not None:
                    drawing.rect(x0, y, time / own * scale, bar - 2, kinds[row])
                    label = f"{time:g} ms"
                    drawing.rect(x0 + time / own * scale + 3, y - 1, 7 * len(label) + 2, bar, "back")
                    drawing.text(x0 + time / own * scale + 5, y + bar - 3, label, "faint")
                y += bar
    drawing.text(20, top + len(cases) * height + 36, "Bars: time relative to t5gemma's in the same type. Labels: the time itself. Shorter is better.", "faint")
    return drawing.svg()


def stacked(results, title, unit, foot):
    """Shares of a whole, a bar for each case."""
    parts = results["parts"]
    kinds = dict(zip(parts, "abcdef"))
    left, width, bar, top = 236, 470, 34, 84
    most = max(sum(case[part] for part in parts) for case in results["cases"])
    drawing = Drawing(left + width + 84, top + len(results["cases"]) * (bar + 18) + 34, title)
    drawing.text(20, 30, title, "title")
    legend(drawing, 20, 56, [(kinds[part], part) for part in parts])
    for at, case in enumerate(results["cases"]):
        x, y = left, top + at * (bar + 18)
        drawing.text(left - 12, y + 15, case["case"], "", "end")
        drawing.text(left - 12, y + 30, case["where"], "faint", "end")
        for part in parts:
            size = case[part] / most * width
            drawing.rect(x, y, size, bar, kinds[part], 0)
            label = f"{case[part]:g}"
            if size > 8 * len(label) + 4:
                drawing.text(x + size / 2, y + bar / 2 + 5, label, "" if kinds[part] == "d" else "on", "middle")
            x += size
        drawing.text(x + 8, y + bar / 2 + 5, f"{sum(case[part] for part in parts):.4g} {unit}")
    drawing.text(20, top + len(results["cases"]) * (bar + 18) + 16, foot, "faint")
    return drawing.svg()


def bars(results, title, unit, foot):
    """A bar for each runtime, a group for each case."""
    kinds = {"t5gemma": "a", "onnxruntime": "b", "ctranslate2": "c"}
    left, width, bar, top = 150, 470, 20, 84
    most = max(case[name] for case in results["cases"] for name in kinds)
    group = 3 * bar + 18
    drawing = Drawing(left + width + 100, top + len(results["cases"]) * group + 28, title)
    drawing.text(20, 30, title, "title")
    legend(drawing, 20, 56, [(kind, NAMES[name]) for name, kind in kinds.items()])
    for at, case in enumerate(results["cases"]):
        y = top + at * group
        drawing.text(left - 12, y + 1.5 * bar + 4, case["case"], "", "end")
        for name, kind in kinds.items():
            size = case[name] / most * width
            drawing.rect(left, y, size, bar - 3, kind)
            drawing.text(left + size + 7, y + bar - 6, f"{case[name]:g} {unit}")
            y += bar
    drawing.text(20, top + len(results["cases"]) * group + 10, foot, "faint")
    return drawing.svg()


def pipeline():
    """Checkpoint, graphs, runtime, doors."""
    drawing = Drawing(962, 316, "From a checkpoint to an application")

    def box(x, width, title, lines):
        height = 52 + 19 * len(lines)
        y = 158 - height / 2
        drawing.rect(x, y, width, height, "tint", 6)
        drawing.text(x + width / 2, y + 28, title, "title", "middle")
        for at, line in enumerate(lines):
            drawing.text(x + width / 2, y + 54 + 19 * at, line, "faint", "middle")

    box(24, 140, "checkpoint", ["config.json", "*.safetensors", "tokenizer.json"])
    drawing.text(234, 148, "t5gemma-export", "", "middle")
    drawing.arrow(164, 158, 304, 158)
    graphs = ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx_data", "tokenizer, settings, manifest"]
    box(306, 214, "model folder", [*graphs, "", "portable · cpu · cuda · tensorrt"])
    drawing.arrow(520, 158, 580, 158)
    box(582, 172, "t5gemma-runtime", ["beam search, sampling", "constraints", "continuous batching", "CPU kernels", "", "on ONNX Runtime"])
    doors = [("command line", "t5gemma generate"), ("Rust", "Model::open"), ("C and C++", "t5gemma.h, .hpp"), ("Python", "import t5gemma")]
    for at, (name, line) in enumerate(doors):
        y = 22 + at * 70
        drawing.arrow(754, 158, 784, y + 30)
        drawing.rect(786, y, 152, 60, "tint", 6)
        drawing.text(862, y + 25, name, "", "middle")
        drawing.text(862, y + 45, line, "faint", "middle")
    return drawing.svg()


def all_options(programs):
    """The page with the help of every command."""
    environment = {**os.environ, "COLUMNS": "100"}

    def help_of(*words):
        command = [programs / words[0], *words[1:], "--help"]
        text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    lines = ["# All options", "", "What the programs print for `--help`.", ""]
    for program in ("t5gemma-export", "t5gemma"):
        text = help_of(program)
        commands = re.findall(r"^  ([a-z][a-z-]+)(?:  |$)", text.partition("Commands:")[2].partition("\n\n")[0], re.M)
        for words in [(program,), *((program, command) for command in commands if command != "help")]:
            lines += [f"## {' '.join(words)}", "", "```text", help_of(*words), "```", ""]
    return "\n".join(lines)


def load(name):
    return json.loads((DOCS / "results" / f"{name}.json").read_text())


def number(value):
    return "" if value is None else f"{value:g}" if value < 10000 else f"{value:.0f}"


def bold(times, unit):
    """Cells of times of which the best is bold; of int8 and int4 the better stands for t5gemma."""
    best = (max if unit == "tokens/s" else min)((t for t in times if t is not None), default=None)
    return ["" if t is None else f"**{number(t)}**" if t == best else number(t) for t in times]


def peers_table(results):
    """The runtimes beside each other, in float32 and in few bits."""
    lines = [
        "| | float32 t5gemma | ONNX Runtime | CTranslate2 | int8 t5gemma | int4 t5gemma | int8 ONNX Runtime | CTranslate2 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in results["cases"]:
        float32 = bold([case["float32"][name] for name in NAMES], case["unit"])
        few = [case["int8"]["t5gemma"], case["int4"]["t5gemma"], case["int8"]["onnxruntime"], case["int8"]["ctranslate2"]]
        lines.append("| " + " | ".join([f"{case['case']}, {case['unit']}", *float32, *bold(few, case["unit"])]) + " |")
    return lines


def pair_table(results):
    lines = ["| | t5gemma | CTranslate2 |", "|---|--:|--:|"]
    for case in results["cases"]:
        cells = bold([case["int8"]["t5gemma"], case["int8"]["ctranslate2"]], case["unit"])
        lines.append("| " + " | ".join([f"{case['case']}, {case['unit']}", *cells]) + " |")
    return lines


def plain_table(results):
    """Columns as they are listed."""
    columns = results["columns"]
    lines = ["| " + " | ".join(["", *(NAMES.get(column, column) for column in columns)]) + " |", "|---|" + "--:|" * len(columns)]
    for case in results["cases"]:
        cells = [case["case"], *(number(v) if isinstance(v := case.get(column), (int, float)) else v or "" for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def summary_table():
    """What the README shows: some cases of one machine."""
    results = load("cascade-lake-s-s")
    shown = ["greedy, source of 64 tokens", "4 beams, source of 512 tokens", "8 rows of 4 beams", "encode 512 tokens"]
    results["cases"] = [case for case in results["cases"] if case["case"] in shown]
    return peers_table(results)


def type_of(schema, document):
    """A JSON type in words."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        of = document["$defs"][name]
        return f"[{name}](#{name.lower()})" if of.get("type") == "object" else type_of(of, document)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if either := schema.get("anyOf") or schema.get("oneOf"):
        if all("const" in one for one in either):
            return "string"
        return " or ".join(dict.fromkeys(type_of(one, document) for one in either if one.get("type") != "null"))
    kinds = schema.get("type", "any")
    kind = next((kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null"), "null")
    if kind == "array" and "prefixItems" in schema:
        return "[" + ", ".join(type_of(item, document) for item in schema["prefixItems"]) + "]"
    if kind == "array":
        item = type_of(schema["items"], document)
        return "list of " + ("lists of " + item.removeprefix("list of ") if item.startswith("list of ") else item + "s" * (item.isalpha()))
    return kind


def fields(name, part=None):
    """The fields of an object: of a schema in ../runtime/protocol/schema, or of one of its `$defs`."""
    document = json.loads((DOCS.parent / "runtime/protocol/schema" / f"{name}.json").read_text())
    schema = document["$defs"][part] if part else document
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for field, value in schema["properties"].items():
        meaning = value.get("description", "").replace("|", "\\|").rstrip(".")
        lines.append(f"| `{field}` | {type_of(value, document)} | {meaning} |")
    return lines


def values(name, part):
    """The values of an enumeration."""
    document = json.loads((DOCS.parent / "runtime/protocol/schema" / f"{name}.json").read_text())
    lines = ["| value | meaning |", "|---|---|"]
    return lines + [f"| `{one['const']}` | {one['description'].rstrip('.')} |" for one in document["$defs"][part]["oneOf"]]


# What the page of plans plans for.
DOCUMENTS, SOURCE_TOKENS, NEW_TOKENS, WORKERS = 1e9, 512, 64, 1000
PLANNED = {
    "s-s, Cascade Lake": "cascade-lake-s-s",
    "s-s, Emerald Rapids": "emerald-rapids-s-s",
    "b-b, Cascade Lake": "cascade-lake-b-b",
    "b-b, Emerald Rapids": "emerald-rapids-b-b",
}


def planned_speed(name):
    rates = plan.measured(load(name), "int8")
    return rates, plan.documents_per_second(SOURCE_TOKENS, NEW_TOKENS, *rates)


def plan_speeds():
    """What a worker of two cores does, and what a run takes of them."""
    lines = [
        "| int8, 2 cores | source tokens/s | new tokens/s | documents/s | worker hours for 10⁹ documents |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, name in PLANNED.items():
        (encoded, decoded), rate = planned_speed(name)
        made = plan.plan(plan.Speed(rate), DOCUMENTS, WORKERS)
        lines.append(f"| {label} | {encoded:.0f} | {decoded:.0f} | {rate:.2f} | {made.worker_seconds / 3600:,.0f} |")
    return lines


def plan_failures():
    """The same run with workers that live longer and shorter."""
    _, rate = planned_speed("cascade-lake-s-s")
    lines = [
        "| hours between failures of a worker | documents of a shard | minutes | shards | failures | not computing | hours of the run |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for hours in (720, 168, 24, 6, 2):
        made = plan.plan(plan.Speed(rate, between_failures=hours * 3600), DOCUMENTS, WORKERS)
        cells = f"{made.shard_documents:,} | {made.shard_seconds / 60:.0f} | {made.shards:,} | {made.failures:,.0f}"
        lines.append(f"| {hours} | {cells} | {made.lost:.1%} | {made.seconds / 3600:.1f} |")
    return lines


TABLES = {
    "plan-speeds": plan_speeds,
    "plan-failures": plan_failures,
    "generate-request": lambda: fields("generate-request"),
    "score-request": lambda: fields("score-request"),
    "encode-request": lambda: fields("encode-request"),
    "tensor-file": lambda: fields("encode-request", "TensorFile"),
    "generate-result": lambda: fields("generate-response", "GenerateResult"),
    "sequence": lambda: fields("generate-response", "Sequence"),
    "finish-reason": lambda: values("generate-response", "FinishReason"),
    "usage": lambda: fields("generate-response", "Usage"),
    "score-result": lambda: fields("score-response", "ScoreResult"),
    "score": lambda: fields("score-response", "Score"),
    "labels-result": lambda: fields("classify-response", "LabelsResult"),
    "token-labels-result": lambda: fields("classify-response", "TokenLabelsResult"),
    "token-labels": lambda: fields("classify-response", "TokenLabels"),
    "label": lambda: fields("classify-response", "Label"),
    "encoder-usage": lambda: fields("classify-response", "EncoderUsage"),
    "error-result": lambda: fields("generate-response", "ErrorResult"),
    "summary": summary_table,
    "zen3-s-s": lambda: peers_table(load("zen3-s-s")),
    "cascade-lake-s-s": lambda: peers_table(load("cascade-lake-s-s")),
    "cascade-lake-b-b": lambda: peers_table(load("cascade-lake-b-b")),
    "cascade-lake-b-b-int8-later": lambda: pair_table(load("cascade-lake-b-b-int8-later")),
    "emerald-rapids-s-s": lambda: peers_table(load("emerald-rapids-s-s")),
    "emerald-rapids-b-b": lambda: peers_table(load("emerald-rapids-b-b")),
    "emerald-rapids-s-s-int8-later": lambda: pair_table(load("emerald-rapids-s-s-int8-later")),
    "shortlist-s-s": lambda: plain_table(load("shortlist-s-s")),
    "export": lambda: plain_table(load("export")),
    "memory-s-s": lambda: plain_table(load("memory-s-s")),
    "quantization-tensorrt": lambda: plain_table(load("quantization-tensorrt")),
    "gpu-memory-2b-2b": lambda: plain_table(load("gpu-memory-2b-2b")),
}

CHARTS = {
    "pipeline": pipeline,
    "speed-zen3": lambda: speed(load("zen3-s-s"), "s-s on AVX2 (AMD Zen 3, 2 cores)"),
    "speed-cascade-lake": lambda: speed(load("cascade-lake-s-s"), "s-s on AVX-512 VNNI (Intel Cascade Lake, 2 cores)"),
    "speed-emerald-rapids": lambda: speed(load("emerald-rapids-s-s"), "s-s on AMX (Intel Emerald Rapids, 2 cores)"),
    "beam-step": lambda: stacked(load("beam-step"), "One step of 8 rows of 4 beams, int8", "ms",
                                 "Milliseconds by kind of work, profiled 2026-11-28. The head includes the sum of exponentials for beam search."),
    "memory": lambda: bars(load("memory-s-s"), "Peak resident memory of the s-s run on Cascade Lake", "GB",
                           "With 32 beams of 256 000 scores each. Less is better."),
    "gpu-memory": lambda: stacked(load("gpu-memory-chart"), "GPU memory of a serving plan, from memory.txt", "GB",
                                  "Calculated for the plan's maximum sizes, not measured. 1 GB is 10⁹ bytes."),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--programs", type=pathlib.Path, metavar="DIR")
    arguments = parser.parse_args()
    check, stale = arguments.check, []

    def put(path, text):
        if path.exists() and path.read_text() == text:
            return
        stale.append(path)
        if not check:
            path.write_text(text)

    for name, draw in CHARTS.items():
        put(DOCS / "src" / "images" / f"{name}.svg", draw())
    used = set()
    for page in [*sorted((DOCS / "src").glob("*.md")), DOCS.parent / "README.md"]:
        def table(found):
            used.add(found[2])
            return "\n".join([found[1], "", *TABLES[found[2]](), "", found[3]])

        text = page.read_text()
        put(page, re.sub(r"(<!-- table ([\w-]+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S))
    if arguments.programs:
        put(DOCS / "src" / "all-options.md", all_options(arguments.programs))
    if unused := sorted(set(TABLES) - used):
        sys.exit(f"tables that no page shows: {', '.join(unused)}")
    for path in stale:
        print("stale:" if check else "wrote", path.relative_to(DOCS.parent))
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
