"""Writes THIRD-PARTY into a folder: the crates linked into libt5gemma, with their licences and licence texts."""

import json
import os
import subprocess
import sys
from pathlib import Path

CARGO = os.environ.get("CARGO", "cargo")
ROOT = Path(__file__).resolve().parents[3]


def cargo(*arguments):
    return subprocess.run([CARGO, *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


linked = {
    tuple(line.split()[:2])
    for line in cargo("tree", "--locked", "-p", "t5gemma-capi", "-e", "normal", "--prefix", "none").splitlines()
}
packages = json.loads(cargo("metadata", "--locked", "--format-version", "1"))["packages"]
with open(Path(sys.argv[1], "THIRD-PARTY"), "w", encoding="utf-8") as out:
    for package in sorted(packages, key=lambda package: (package["name"], package["version"])):
        if (package["name"], f"v{package['version']}") not in linked or package["source"] is None:
            continue
        out.write(f"== {package['name']} {package['version']}: {package['license'] or package['license_file']}\n")
        folder = Path(package["manifest_path"]).parent
        for file in sorted(folder.iterdir()):
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")) and file.is_file():
                out.write(f"\n-- {file.name}\n\n{file.read_text(encoding='utf-8', errors='replace')}\n")
        out.write("\n")
