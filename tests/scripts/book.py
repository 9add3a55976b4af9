#!/usr/bin/env python3
"""Runs, compiles or parses every fenced block of the book, of README.md and of the other pages for people, and checks their
links: `book.py --programs DIR --checkpoint DIR --classifier DIR [--prefix DIR] [--site DIR] [PAGE...]`.

The blocks of a page run in order in one scratch folder, with `checkpoint` and `classifier-checkpoint` in it, and stand-ins of
published checkpoints (`Checker.stand_ins`). What a block's language is decides what is done with it:

  sh, console         run; in a console block, lines that begin with `$ ` are commands and the others their output
  python              run, with the package t5gemma of --site; with the word `example` behind it, compared with the examples
  c, cpp              compiled against the library in --prefix; a block with a `main` is run with the argument `model`
  rust                left to rustdoc: tests/lib.rs has to include the page
  cmake, make         compared with the examples
  json, jsonl, toml, yaml   parsed
  imports             left to check_imports.py
  text                nothing: it is prose

A word behind the language says why a block of commands is not run: `gpu`, `network`, `checkpoint` (one that is not here), `large`
(in time or space), `repository` (it changes this one) or `server` (it starts or asks one; Python may say so too). Its syntax, the flags of its commands and its make targets are checked.
Without --prefix or --site, blocks that need them are parsed only. The last line counts all blocks.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
NOT_RUN = {"gpu", "network", "checkpoint", "large", "repository", "server"}
PROGRAMS = ("t5gemma", "t5gemma-export")
SECONDS = 300


class Block:
    def __init__(self, page, line, language, words, text):
        self.page, self.line, self.language, self.words, self.text = page, line, language, words, text

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Wrong(Exception):
    """What is wrong with a block or a link."""


def blocks(page):
    """The fenced blocks of a page; the lines outside of them are returned too."""
    found, outside, fence = [], [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence is None and (opening := re.match(r"^( *)(`{3,}|~{3,})(.*)$", line)):
            fence, start, lines = opening, number, []
        elif fence is not None and line.strip() == fence[2]:
            language, *words = fence[3].replace(",", " ").split() or [""]
            indent = len(fence[1])
            text = "".join(f"{line[indent:]}\n" for line in lines)
            found.append(Block(page, start, language, words, text))
            fence = None
        elif fence is not None:
            lines.append(line)
        else:
            outside.append((number, line))
    if fence is not None:
        raise Wrong(f"{page.relative_to(ROOT)}:{start}: the block has no end")
    return found, outside


class Checker:
    def __init__(self, arguments):
        self.arguments = arguments
        self.help = {}
        self.counts = collections.Counter()
        self.environment = dict(os.environ)
        python = os.environ.get("T5GEMMA_PYTHON", sys.executable)
        self.python = python
        self.environment["PATH"] = os.pathsep.join([str(arguments.programs.resolve()), os.path.dirname(python), os.environ["PATH"]])
        if arguments.prefix:
            self.environment["PKG_CONFIG_PATH"] = str(arguments.prefix / "lib/pkgconfig")
        if arguments.site:
            self.environment["PYTHONPATH"] = str(arguments.site)
        makefile = (ROOT / "Makefile").read_text()
        self.targets = set(re.findall(r"^\.PHONY: (\S+)", makefile, re.M))

    def run(self, command, folder, text=None, **given):
        done = subprocess.run(command, cwd=folder, input=text, env=self.environment, text=True, capture_output=True, timeout=SECONDS, **given)
        if done.returncode:
            raise Wrong(f"exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def flags_of(self, program, command):
        """The flags that `--help` names."""
        key = (program, command)
        if key not in self.help:
            words = [program] + ([command] if command else [])
            text = self.run([*words, "--help"], ROOT)
            self.help[key] = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) | {"--help", "--version", "-h"}
        return self.help[key]

    def commands_of(self, program):
        if program not in self.help:
            self.help[program] = set(re.findall(r"^  ([a-z][a-z-]+)(?:  |$)", self.run([program, "--help"], ROOT), re.M))
        return self.help[program]

    def check_commands(self, text):
        """That a shell takes the text, and that programs take the flags and make the targets in it."""
        self.run(["bash", "-n"], ROOT, text)
        text = re.sub(r"<<-?\s*'?(\w+)'?(.*)\n(?:.*\n)*?\s*\1\n", r"\2\n", text + "\n")
        for line in text.replace("\\\n", " ").splitlines():
            for command in re.split(r"(?<!<)[|;&]+(?!&)|\$\(|`", line.split(" #")[0]):
                try:
                    words = shlex.split(command, comments=True)
                except ValueError:
                    continue
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                name = words[0].rsplit("/", 1)[-1] if words else ""
                if name == "make":
                    self.check_make(words[1:])
                elif name in PROGRAMS:
                    self.check_flags(name, words[1:])

    def check_make(self, words):
        targets = [word for word in words if "=" not in word and not word.startswith("-")]
        if unknown := set(targets) - self.targets:
            raise Wrong(f"the Makefile has no target {', '.join(sorted(unknown))}")

    def check_flags(self, program, words):
        command = words[0] if words and words[0] in self.commands_of(program) else ""
        if program == "t5gemma" and not command and words[:1] not in [["--help"], ["--version"]]:
            raise Wrong(f"t5gemma has no command {' '.join(words[:1])!r}")
        for word in words:
            if word == "--":
                break
            flag = word.split("=")[0]
            if re.match(r"--?[a-z]", word) and flag not in self.flags_of(program, command):
                raise Wrong(f"{program} {command} has no {flag}")

    def shell(self, block, folder):
        reasons = set(block.words)
        if unknown := reasons - NOT_RUN:
            raise Wrong(f"expected {', '.join(sorted(NOT_RUN))} behind the language, found {', '.join(sorted(unknown))}")
        steps = [(block.text, None)] if block.language == "sh" else console(block.text)
        for command, _ in steps:
            self.check_commands(command)
        if reasons:
            return f"checked only ({', '.join(sorted(reasons))})"
        for command, expected in steps:
            printed = self.run(["bash", "-euo", "pipefail", "-c", command], folder, stdin=None)
            if expected is not None and not matches(printed, expected):
                raise Wrong(f"expected\n{expected}found\n{printed}")
        return "run"

    def python_block(self, block, folder):
        compile(block.text, str(block), "exec")
        if block.words == ["server"]:
            return "checked only (server)"
        if block.words:
            return self.example(block)
        if "t5gemma" in block.text and not self.arguments.site:
            return "parsed only (no --site)"
        self.run([self.python, "-"], folder, block.text)
        return "run"

    def c_block(self, block, folder):
        is_c = block.language == "c"
        has_main = re.search(r"\bmain\(", block.text)
        source = folder / f"block-{block.line}.{block.language}"
        source.write_text(block.text)
        compiler = ["cc", "-std=c11"] if is_c else ["c++", "-std=c++17"]
        compiler += ["-Wall", "-Wextra", "-Werror"]
        if not self.arguments.prefix or not has_main:
            self.run([*compiler, "-fsyntax-only", "-I", str(ROOT / "runtime/capi/include"), str(source)], folder)
            return "compiled"
        found = self.run(["pkg-config", "--cflags", "--libs", "t5gemma"], folder).split()
        program = source.with_suffix("")
        library = self.arguments.prefix / "lib"
        self.run([*compiler, str(source), "-o", str(program), *found, "-pthread", f"-Wl,-rpath,{library}"], folder)
        self.run([str(program), "model"], folder)
        return "run"

    def example(self, block):
        """That each line stands in one of the examples, in this order."""
        if set(block.words) - {"example"}:
            raise Wrong(f"expected example behind the language, found {' '.join(block.words)}")
        files = [*ROOT.glob("examples/*/CMakeLists.txt"), *ROOT.glob("examples/*/Makefile"), *ROOT.glob("examples/*/*.py")]
        if not any(block.text.strip() in file.read_text() for file in files):
            raise Wrong("no example has these lines")
        return "compared"

    def rust(self, block):
        page = os.path.relpath(block.page, ROOT / "tests")
        if f'"{page}"' not in (ROOT / "tests/lib.rs").read_text():
            raise Wrong(f"tests/lib.rs does not include {page}, so that nothing compiles its Rust")
        if set(block.words) - {"no_run", "should_panic"}:
            raise Wrong("expected no word behind rust but no_run")
        return "compiled by rustdoc"

    def block(self, block, folder):
        match block.language:
            case "sh" | "console":
                return self.shell(block, folder)
            case "python":
                return self.python_block(block, folder)
            case "c" | "cpp":
                return self.c_block(block, folder)
            case "rust":
                return self.rust(block)
            case "cmake" | "make":
                return self.example(block)
            case "json":
                json.loads(block.text)
                return "parsed"
            case "jsonl":
                for line in block.text.splitlines():
                    json.loads(line)
                return "parsed"
            case "toml":
                tomllib.loads(block.text)
                return "parsed"
            case "yaml":
                # The Python that checks links alone may lack it.
                import yaml

                list(yaml.safe_load_all(block.text))
                return "parsed"
            case "imports":
                return "checked by check_imports.py"
            case "text":
                return "prose"
        raise Wrong(f"expected a language that is checked, found {block.language!r}")

    def stand_ins(self, folder):
        """Small checkpoints under the names of published ones, the vector that Stable Audio 3 has learned for padding, a LoRA
        adapter of the checkpoint, and a photo."""
        for name in ("t5gemma-b-b-ul2", "t5gemma-9b-9b-ul2"):
            (folder / name).symlink_to(self.arguments.checkpoint.resolve())
        for name, source in (("gemma-2-2b", "balanced/gemma2-a"), ("gemma-2-9b", "unbalanced/gemma2-b")):
            (folder / name).symlink_to(ROOT / "tests/fixtures/adapt" / source)
        (folder / "gemma-3-4b-pt").symlink_to(ROOT / "tests/fixtures/adapt_gemma3/gemma3-images")
        (folder / "T5Gemma-TTS-2b-2b").symlink_to(ROOT / "tests/fixtures/voice/progress/checkpoint")
        with_images = folder / "t5gemma-2-270m-270m"
        with_images.mkdir()
        for file in (ROOT / "tests/fixtures/public/t2-vision/checkpoint").iterdir():
            (with_images / file.name).symlink_to(file)
        (with_images / "tokenizer.json").symlink_to(ROOT / "tests/fixtures/images/tokenizer.json")
        (folder / "photo.jpg").symlink_to(ROOT / "tests/fixtures/images/files/rgb420.jpg")
        encoder = json.loads((self.arguments.checkpoint / "config.json").read_text())["encoder"]
        width, queries = encoder["hidden_size"], encoder["num_attention_heads"] * encoder["head_dim"]
        (folder / "stable-audio-3").mkdir()
        padding = {"conditioner.conditioners.prompt.padding_embedding": [width]}
        (folder / "stable-audio-3/model.safetensors").write_bytes(safetensors(padding))
        tensors = {}
        for layer in range(encoder["num_hidden_layers"]):
            module = f"base_model.model.model.encoder.layers.{layer}.self_attn.q_proj"
            tensors |= {f"{module}.lora_A.weight": [2, width], f"{module}.lora_B.weight": [queries, 2]}
        (folder / "lora-adapter").mkdir()
        (folder / "lora-adapter/adapter_model.safetensors").write_bytes(safetensors(tensors))
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": r".*\.encoder\..*\.q_proj"}
        (folder / "lora-adapter/adapter_config.json").write_text(json.dumps(config))

    def page(self, page, problems):
        found, _ = blocks(page)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            (folder / "checkpoint").symlink_to(self.arguments.checkpoint.resolve())
            (folder / "classifier-checkpoint").symlink_to(self.arguments.classifier.resolve())
            self.stand_ins(folder)
            for block in found:
                try:
                    self.counts[block.language, self.block(block, folder)] += 1
                except (Wrong, SyntaxError, ValueError, subprocess.TimeoutExpired) as error:
                    self.counts[block.language, "WRONG"] += 1
                    problems.append(f"{block}: {block.language}: {error}")


def safetensors(shapes):
    """A safetensors file of float32 tensors, whose numbers are small."""
    header, count = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [4 * count, 4 * (count + size)]}
        count += size
    text = json.dumps(header).encode()
    return struct.pack(f"<Q{len(text)}s{count}f", len(text), text, *(at % 7 / 1000 for at in range(count)))


def console(text):
    """Commands and what each prints."""
    steps = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append([line[2:], ""])
        elif not steps:
            raise Wrong("expected a line that begins with `$ `")
        elif steps[-1][0].endswith("\\"):
            steps[-1][0] += "\n" + line
        else:
            steps[-1][1] += line + "\n"
    return steps


def matches(printed, expected):
    """Whether a text is the other one, in which a line `…` stands for any lines and `…` in a line for anything."""
    pattern = re.escape(expected).replace("…\\\n", "…NEWLINE")
    pattern = re.sub(r"^…NEWLINE", r"(?:.*\\n)*?", pattern, flags=re.M).replace("…NEWLINE", ".*\n").replace("…", ".*")
    return re.fullmatch(pattern, printed) is not None


def anchors(page):
    """What a link can point at in a page: its headings, as GitHub and mdBook call them."""
    _, outside = blocks(page)
    found = collections.Counter()
    names = set()
    for _, line in outside:
        if heading := re.match(r"#+ +(.*?)\s*$", line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading[1])
            name = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text).lower())
            names.add(f"{name}-{found[name]}" if found[name] else name)
            found[name] += 1
    return names


def check_links(pages, problems):
    """That every link within the project leads somewhere; those outside are counted."""
    inside = outside_count = 0
    for page in pages:
        _, lines = blocks(page)
        for number, line in lines:
            line = re.sub(r"`[^`]*`", lambda code: " " * len(code[0]), line)
            for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"", line):
                target = target[0] or target[1]
                if re.match(r"[a-z]+:", target):
                    outside_count += 1
                    continue
                inside += 1
                path, _, anchor = target.partition("#")
                to = (page.parent / path).resolve() if path else page
                where = f"{page.relative_to(ROOT)}:{number}"
                if not to.exists():
                    problems.append(f"{where}: {target}: there is no such file")
                elif to.is_relative_to(ROOT / "docs/src") != page.is_relative_to(ROOT / "docs/src") and not page.is_relative_to(ROOT / "docs/src"):
                    pass
                elif page.is_relative_to(ROOT / "docs/src") and not to.is_relative_to(ROOT / "docs/src"):
                    problems.append(f"{where}: {target}: the book cannot link outside of itself")
                if anchor and to.suffix == ".md" and to.exists() and anchor not in anchors(to):
                    problems.append(f"{where}: {target}: there is no such heading")
    return f"{inside} links within the project, {outside_count} outside (not followed)"


def check_summary(problems):
    """That the table of contents has every page, once."""
    listed = re.findall(r"\]\((.*?)\)", (ROOT / "docs/src/SUMMARY.md").read_text())
    there = {page.name for page in (ROOT / "docs/src").glob("*.md")} - {"SUMMARY.md"}
    if sorted(listed) != sorted(there):
        problems.append(f"docs/src/SUMMARY.md: lists {sorted(set(listed) ^ there) or 'a page twice'}")


def check_options(problems):
    """That the tables of generation options have each option of `GenerationOptions`, with its default."""
    page, source = ROOT / "docs/src/generation-options.md", ROOT / "runtime/src/options.rs"
    table = re.search(r"^generation_options! \{\n(.*?)^\}", source.read_text(), re.M | re.S)[1]
    options = {name: default for name, default in re.findall(r"^    (\w+): .*? = (.*?), form::(?!not_json)", table, re.M)}
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \| [^|]* \|$", page.read_text(), re.M))
    constraints = set(re.findall(r"^\| `(\w+)` \| `--", page.read_text(), re.M))
    for name in options.keys() ^ (rows.keys() | constraints):
        problems.append(f"{page.relative_to(ROOT)}: {name} stands {'here' if name in rows else 'in ' + source.name} only")
    for name in options.keys() & rows.keys():
        default, shown = options[name], rows[name]
        if re.fullmatch(r"[\d.]+|true|false", default) and re.fullmatch(r"[\d.]+|true|false", shown):
            if (float(default) != float(shown)) if default[0].isdigit() and shown[0].isdigit() else default != shown:
                problems.append(f"{page.relative_to(ROOT)}: {name}: the default is {default}, found {shown}")


def check_paths(pages, problems):
    """That files of the project that pages name are there."""
    for page in pages:
        _, lines = blocks(page)
        for number, line in lines:
            for path in re.findall(r"`((?:graphs|exporter|runtime|tests|docs|examples|\.ci)/[\w./*-]+)`", line):
                if not any(ROOT.glob(path.rstrip("/"))):
                    problems.append(f"{page.relative_to(ROOT)}:{number}: there is no {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("programs", "checkpoint", "classifier"):
        parser.add_argument(f"--{name}", type=pathlib.Path)
    parser.add_argument("--prefix", type=pathlib.Path)
    parser.add_argument("--site", type=pathlib.Path)
    parser.add_argument("--links", action="store_true", help="check links and files only")
    parser.add_argument("pages", nargs="*", type=pathlib.Path)
    arguments = parser.parse_args()
    everything = [ROOT / page for page in PAGES if (ROOT / page).exists()] + sorted((ROOT / "docs/src").glob("*.md"))
    pages = [page.resolve() for page in arguments.pages] or everything
    problems = []
    links = check_links(pages, problems)
    check_summary(problems)
    check_options(problems)
    check_paths(pages, problems)
    print(f"{len(pages)} pages, {links}")
    if not arguments.links:
        checker = Checker(arguments)
        for page in pages:
            checker.page(page, problems)
        counts = sorted(checker.counts.items())
        print("\n".join(f"{language} {what}: {count}" for (language, what), count in counts))
        print(f"{sum(count for _, count in counts)} blocks, none skipped")
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
