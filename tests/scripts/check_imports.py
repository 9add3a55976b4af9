"""Checks that imports run one way: no circle between the top-level modules of a crate, and no arrow that the code map forbids.

    check_imports.py [ROOT]

The rules are the lines of the blocks fenced as ```imports in the Markdown files of ROOT and ROOT/docs:

    CRATE -> CRATE[::{MODULE, ...}], ...      the crates of ours that a crate may use, and which modules of them; nothing after the arrow: none
    CRATE::{MODULE, ...} -/-> NAME, ...       what these modules must not use: modules of the same crate, or other crates
    NAME only in FILE, ...                    the files or folders, from ROOT, that use this crate outside of tests

A crate is named by its folder. Unit tests and documentation may import anything. Exit status 1 and one line a fault, or a count of arrows.
"""

import re
import sys
import tomllib
from pathlib import Path


def without_comments_and_tests(text):
    """Rust source without comments, strings and items under #[cfg(test)]; lines keep their numbers."""
    pattern = r'//[^\n]*|/\*.*?\*/|r(#*)".*?"\1|b?"(?:\\.|[^"\\])*"|\'(?:\\.[^\']*|[^\'\\])\''
    text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    while match := re.search(r"#\[cfg\((?:all\()?test\b[^\]]*\]", text):
        end, depth = match.end(), 0
        while end < len(text):
            if text[end] == ";" and depth == 0:
                break
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if text[end] == "}" and depth == 0:
                break
            end += 1
        text = text[: match.start()] + "\n" * text[match.start() : end + 1].count("\n") + text[end + 1 :]
    return text


def paths_of_tree(prefix, tree):
    """The paths of a use tree such as `{a::b, c::{d, e as f}}` after `prefix`."""
    tree = tree.strip()
    if not (brace := re.search(r"\{", tree)):
        return [prefix + [part.strip().split(" ")[0] for part in tree.split("::") if part.strip()]]
    head = [part.strip() for part in tree[: brace.start()].split("::") if part.strip()]
    parts, depth, current = [], 0, ""
    for character in tree[brace.end() : tree.rindex("}")]:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    parts.append(current)
    return [path for part in parts if part.strip() for path in paths_of_tree(prefix + head, part)]


def uses(text):
    """(line, path, whether it is re-exported) of each `use` declaration and of each path that begins with `crate::` or `super::` or a
    crate's name."""
    found = []

    def declared(match):
        line = text.count("\n", 0, match.start(2)) + 1
        found.extend((line, path, bool(match[1])) for path in paths_of_tree([], match[2]))
        return "\n" * match[0].count("\n")

    # `use` first, so that its trees are not read as plain paths.
    rest = re.sub(r"(?m)^[ \t]*(pub(?:\([^)]*\))?[ \t]+)?use[ \t]+([^;]+);", declared, text)
    for match in re.finditer(r"(?<![\w:])((?:::)?[a-z_]\w*(?:::\w+)+)", rest):
        found.append((rest.count("\n", 0, match.start()) + 1, match[1].strip(":").split("::"), False))
    return found


class Crate:
    """A package of the workspace with its library's (or program's) modules."""

    def __init__(self, root, folder):
        manifest = tomllib.loads((root / folder / "Cargo.toml").read_text())
        self.folder = folder
        self.name = manifest.get("lib", {}).get("name", manifest["package"]["name"]).replace("-", "_")
        self.names = {self.name, manifest["package"]["name"].replace("-", "_")}
        self.files = {}
        for file in sorted((root / folder / "src").rglob("*.rs")):
            parts = list(file.relative_to(root / folder / "src").with_suffix("").parts)
            if parts in (["lib"], ["main"]):
                parts = []
            elif parts[-1] == "mod":
                parts.pop()
            self.files[file.relative_to(root)] = (parts, uses(without_comments_and_tests(file.read_text())))
        self.modules = {parts[0] for parts, _ in self.files.values() if parts}
        # What the root re-exports is a use of the module it comes from.
        self.homes = {}
        for parts, found in self.files.values():
            for _, path, public in found if not parts else ():
                path = path[1:] if path[0] in ("crate", "self") else path
                if public and len(path) > 1 and path[0] in self.modules:
                    self.homes[path[-1]] = path[0]

    def arrows(self):
        """(file, line, module, module used) inside of the crate."""
        for file, (parts, found) in self.files.items():
            for line, path, _ in found if parts else ():
                if path[0] == "crate":
                    rest = path[1:]
                elif path[0] == "super":
                    ups = next((i for i, part in enumerate(path) if part != "super"), len(path))
                    # From the module of the file; nested inline modules only make it deeper.
                    rest = parts[: max(len(parts) - ups, 0)] + path[ups:]
                else:
                    continue
                used = next(iter(rest), None)
                used = used if used in self.modules else self.homes.get(used)
                if used and used != parts[0]:
                    yield file, line, parts[0], used


def circles(edges):
    """The strongly connected components of more than one node."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in sorted(edges.get(node, ())):
            if after not in index:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], index[after])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def listed(text):
    """`a, b::{c, d}` as {"a": None, "b": {"c", "d"}}."""
    found = {}
    for name, modules in re.findall(r"([\w/.-]+)(?:::\{([^}]*)\})?", text):
        found[name] = {module.strip() for module in modules.split(",")} if modules else None
    return found


def rules(root):
    allowed, forbidden, homes = {}, [], {}
    files = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    lines = [
        line
        for file in sorted(files)
        for block in re.findall(r"^```imports\n(.*?)^```", file.read_text(), re.S | re.M)
        for line in block.splitlines()
    ]
    for line in filter(None, map(str.strip, lines)):
        if match := re.fullmatch(r"(\S+)::\{([^}]*)\} -/-> (.+)", line):
            modules = {module.strip() for module in match[2].split(",")}
            forbidden.append((match[1], modules, {name.strip() for name in match[3].split(",")}))
        elif match := re.fullmatch(r"(\S+) ->(.*)", line):
            allowed[match[1]] = listed(match[2])
        elif match := re.fullmatch(r"(\S+) only in (.+)", line):
            homes[match[1].replace("-", "_")] = [Path(name.strip()) for name in match[2].split(",")]
        else:
            sys.exit(f"the code map: expected a rule such as 'exporter -> graphs', found '{line}'")
    if not allowed:
        sys.exit("no ```imports block in README.md and docs: which crate may use which is not known")
    return allowed, forbidden, homes


def faults(root):
    workspace = tomllib.loads((root / "Cargo.toml").read_text())["workspace"]["members"]
    crates = {folder: Crate(root, folder) for folder in workspace if (root / folder / "src").is_dir()}
    by_name = {name: crate for crate in crates.values() for name in crate.names}
    allowed, forbidden, homes = rules(root)
    found, count = [], 0
    for folder in [*allowed, *(folder for folder, _, _ in forbidden)]:
        if folder not in workspace:
            found.append(f"the code map: '{folder}' is not a crate of the workspace")
    for home in (home for files in homes.values() for home in files):
        if not (root / home).exists():
            found.append(f"the code map: '{home}' does not exist")
    for folder, modules, _ in forbidden:
        for module in sorted(modules - crates[folder].modules) if folder in crates else ():
            found.append(f"the code map: '{folder}' has no module '{module}'")

    for folder, crate in crates.items():
        if folder not in allowed:
            found.append(f"the code map: no line says which crates {folder} may use")
        edges, places = {}, {}
        for file, line, module, used in crate.arrows():
            count += 1
            edges.setdefault(module, set()).add(used)
            places.setdefault((module, used), f"{file}:{line}")
        for circle in circles(edges):
            arrows = [f"{a} -> {b} ({places[a, b]})" for a in circle for b in sorted(edges.get(a, ())) if b in circle]
            found.append(f"{folder}: a circle of imports: " + ", ".join(arrows))
        for at, modules, names in forbidden:
            for (module, used), place in sorted(places.items()) if at == folder else ():
                if module in modules and used in names:
                    found.append(f"{place}: {module} must not use {used}")
        for file, (parts, uses_of_file) in crate.files.items():
            for line, path, _ in uses_of_file:
                if path[0] in crate.modules:
                    continue  # A module of this crate, whatever other crates are called.
                other = by_name.get(path[0])
                for at, modules, names in forbidden:
                    if at == folder and parts and parts[0] in modules and path[0] in names:
                        found.append(f"{file}:{line}: {parts[0]} must not use {path[0]}")
                if path[0] in homes and not any(home == file or home in file.parents for home in homes[path[0]]):
                    found.append(f"{file}:{line}: {path[0]} is for {', '.join(map(str, homes[path[0]]))} only")
                if other is None or other is crate:
                    continue
                count += 1
                may = allowed.get(folder, {})
                if other.folder not in may:
                    found.append(f"{file}:{line}: {folder} must not use {other.folder}")
                elif may[other.folder] is not None and len(path) > 1:
                    module = path[1] if path[1] in other.modules else other.homes.get(path[1], path[1])
                    if module not in may[other.folder]:
                        found.append(f"{file}:{line}: {folder} must not use {other.folder}::{module}")
    return sorted(set(found)), count


if __name__ == "__main__":
    problems, arrows = faults(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"imports run one way: {arrows} arrows")
