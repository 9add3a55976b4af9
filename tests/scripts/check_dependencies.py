#!/usr/bin/env python3
"""Holds the dependencies in Cargo.lock to deny.toml, as far as `cargo metadata` knows them: licences, duplicate versions and
sources. `make deny` checks the same with cargo-deny, which takes minutes to build, and advisories.

`check_dependencies.py --test` checks that it finds what it should.
"""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def is_allowed(expression, allowed):
    """Whether an SPDX expression can be met by licences that are allowed. An old `/` is an OR; AND binds more tightly."""
    words = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either():
        met = both()
        while words and words[0] == "OR":
            words.pop(0)
            met = both() or met
        return met

    def both():
        met = one()
        while words and words[0] == "AND":
            words.pop(0)
            met = one() and met
        return met

    def one():
        if words[0] == "(":
            words.pop(0)
            met = either()
            words.pop(0)
            return met
        licence = words.pop(0)
        if words and words[0] == "WITH":
            licence = f"{licence} {words.pop(0)} {words.pop(0)}"
        return licence in allowed

    return either()


def matches(version, prefix):
    """Whether a version is one of a shorter one: 0.13.1 of 0.13."""
    return version.split(".")[: prefix.count(".") + 1] == prefix.split(".")


def problems(packages, rules, registry):
    """What is wrong, a line each. `registry` is the source of packages from crates.io."""
    found = []
    allowed = set(rules["licenses"]["allow"])
    exceptions = {entry["crate"]: set(entry["allow"]) for entry in rules["licenses"].get("exceptions", [])}
    unused = set(exceptions) - {package["name"] for package in packages}
    skipped = {tuple(entry["crate"].split("@")): False for entry in rules["bans"]["skip"]}
    versions = {}
    for package in packages:
        name, version = package["name"], package["version"]
        if package["source"] is None:
            continue
        if package["source"] != registry:
            found.append(f"{name} {version}: source {package['source']} is not crates.io")
        if not package["license"] or not is_allowed(package["license"], allowed | exceptions.get(name, set())):
            found.append(f"{name} {version}: licence {package['license']} is not allowed by deny.toml")
        entry = next((entry for entry in skipped if entry[0] == name and matches(version, entry[1])), None)
        if entry:
            skipped[entry] = True
        else:
            versions.setdefault(name, []).append(version)
    found += [f"{name}: versions {', '.join(sorted(v))}; keep one, or list the others in deny.toml" for name, v in versions.items() if len(v) > 1]
    found += [f"deny.toml: nothing needs {name} {version} any more" for (name, version), is_used in skipped.items() if not is_used]
    found += [f"deny.toml: nothing needs an exception for {name} any more" for name in sorted(unused)]
    return found


def test():
    registry = "registry+https://example.com/index"
    rules = {"licenses": {"allow": ["MIT", "Apache-2.0 WITH LLVM-exception"]}, "bans": {"skip": [{"crate": "old@0.1"}]}}
    package = {"name": "a", "version": "1.0.0", "license": "MIT", "source": registry}
    old = {**package, "name": "old", "version": "0.1.2"}
    cases = [
        ([package, old], []),
        ([package, old, {**old, "version": "0.2.0"}], []),
        ([{**package, "license": "GPL-3.0 OR (MIT AND Apache-2.0 WITH LLVM-exception)"}, old], []),
        ([{**package, "license": "GPL-3.0/MIT"}, old], []),
        ([{**package, "license": "MIT AND GPL-3.0"}, old], ["a 1.0.0: licence MIT AND GPL-3.0 is not allowed by deny.toml"]),
        ([{**package, "license": None}, old], ["a 1.0.0: licence None is not allowed by deny.toml"]),
        ([{**package, "source": "git+https://example.com/a"}, old], ["a 1.0.0: source git+https://example.com/a is not crates.io"]),
        ([package, {**package, "version": "2.0.0"}, old], ["a: versions 1.0.0, 2.0.0; keep one, or list the others in deny.toml"]),
        ([package], ["deny.toml: nothing needs old 0.1 any more"]),
    ]
    for packages, expected in cases:
        assert problems(packages, rules, registry) == expected, (packages, problems(packages, rules, registry))
    rules["licenses"]["exceptions"] = [{"crate": "b", "allow": ["MPL-2.0"]}]
    cases = [
        ([{**package, "name": "b", "license": "MPL-2.0"}, old], []),
        ([{**package, "license": "MPL-2.0"}, {**package, "name": "b"}, old], ["a 1.0.0: licence MPL-2.0 is not allowed by deny.toml"]),
        ([package, old], ["deny.toml: nothing needs an exception for b any more"]),
    ]
    for packages, expected in cases:
        assert problems(packages, rules, registry) == expected, (packages, problems(packages, rules, registry))


def crates_io(packages):
    """The source of crates.io: that of the workspace's dependencies that name no registry, repository or path."""
    members = [package for package in packages if package["source"] is None]
    sources = {
        entry["source"]
        for package in members
        for entry in package["dependencies"]
        if entry["registry"] is None and (entry["source"] or "").startswith("registry+")
    }
    (source,) = sources
    return source


def main():
    if sys.argv[1:] == ["--test"]:
        return test()
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
    packages = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)["packages"]
    found = problems(packages, tomllib.loads((ROOT / "deny.toml").read_text()), crates_io(packages))
    print("\n".join(found) or f"{len(packages)} packages: licences, versions and sources are as deny.toml has them")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
