"""Builds the wheel: the package, the header, and the library of an installed prefix, named by T5GEMMA_PREFIX. It is a build
backend of its own (PEP 517), because there is nothing to compile: a wheel is a zip file with three metadata files."""

import base64
import hashlib
import os
import sysconfig
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
# The time of all zip entries, so that equal files give equal bytes.
TIME = (1980, 1, 1, 0, 0, 0)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    prefix = Path(os.environ["T5GEMMA_PREFIX"])
    version = next(
        line.partition(":")[2].strip()
        for line in (prefix / "lib/pkgconfig/t5gemma.pc").read_text().splitlines()
        if line.startswith("Version:")
    )
    tag = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    files = {f"t5gemma/{file.name}": file for file in sorted((HERE / "t5gemma").glob("*py*")) if file.is_file()}
    files["t5gemma/t5gemma.h"] = prefix / "include/t5gemma.h"
    for name in ("libt5gemma.so", "libt5gemma.dylib", "libonnxruntime.so", "libonnxruntime.dylib"):
        if (prefix / "lib" / name).exists():
            files[f"t5gemma/{name}"] = prefix / "lib" / name
    info = f"t5gemma-{version}.dist-info"
    files[f"{info}/licenses/LICENSE"] = prefix / "share/doc/t5gemma/LICENSE"
    contents = {name: file.read_bytes() for name, file in files.items()}
    contents[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.4\nName: t5gemma\nVersion: {version}\nSummary: Runs T5Gemma models with ONNX Runtime\n"
        "License-Expression: Apache-2.0\nLicense-File: LICENSE\nRequires-Python: >=3.9\nRequires-Dist: numpy\n"
        'Provides-Extra: ray\nRequires-Dist: ray[serve]>=2.60; extra == "ray"\n'
    ).encode()
    contents[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: t5gemma\nRoot-Is-Purelib: false\nTag: {tag}\n"
    ).encode()
    record = []
    name = f"t5gemma-{version}-{tag}.whl"
    with zipfile.ZipFile(Path(wheel_directory, name), "w", zipfile.ZIP_DEFLATED) as wheel:
        def add(path, data):
            entry = zipfile.ZipInfo(path, TIME)
            entry.external_attr = (0o755 if path.endswith((".so", ".dylib")) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, data)

        for path, data in contents.items():
            add(path, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(data)}\n")
        add(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]).encode())
    return name
