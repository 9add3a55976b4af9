"""What of libt5gemma other programs rely on: capi_abi.py HEADER LIBRARY RUST prints it, a line each, after checking that the
library exports what the header declares and nothing else, that every field is 8 bytes wide in C, and that the structs of the
Rust files have the header's fields in the header's order."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

header, library, rust = map(Path, sys.argv[1:])
text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
text = re.sub(r"static inline .*?\n}\n", "", text, flags=re.S)

constants = re.findall(r"^#define (T5G_\w+) (.+)$", text, flags=re.M)
constants += re.findall(r"\b(T5G_\w+) = (\d+)", text)
functions = {
    match[2]: re.sub(r"\s+", " ", match[0])
    for match in re.finditer(r"^([\w ]+[ *]+)(t5g_\w+)\([^()]*\);", text, flags=re.M)
}
callbacks = [re.sub(r"\s+", " ", found) for found in re.findall(r"^typedef \w+ \(\*.*?;", text, flags=re.M | re.S)]
structs = {}
for body, name in re.findall(r"typedef struct t5g_\w+ {(.*?)} (t5g_\w+);", text, flags=re.S):
    structs[name] = []
    for declared in filter(None, (part.strip() for part in re.sub(r"\s+", " ", body).split(";"))):
        function = re.match(r"\w+ \(\*(\w+)\)\(.*\)$", declared)
        kind, names = declared, function[1] if function else ""
        if not function:
            kind, names = re.match(r"((?:const )?\w+(?: \*const)?) ?(.*)$", declared).groups()
        for field in names.split(","):
            structs[name].append((field.split("*")[-1].strip(), kind + (" *" if "*" in field and not function else "")))

found = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
exported = {line.split()[-1].split("@")[0] for line in found.splitlines() if line.split()[-2] != "A"}
assert exported == set(functions), f"exported, not declared or the reverse: {sorted(exported ^ set(functions))}"

asserts = ["#include <t5gemma.h>"]
for name, fields in structs.items():
    asserts.append(f'_Static_assert(sizeof({name}) == {8 * len(fields)}, "{name}");')
    for at, (field, _) in enumerate(fields):
        asserts.append(f'_Static_assert(offsetof({name}, {field}) == {8 * at}, "{name}.{field}");')
with tempfile.TemporaryDirectory() as folder:
    program = Path(folder, "layout.c")
    program.write_text("\n".join(asserts))
    subprocess.run(["cc", "-std=c11", "-fsyntax-only", f"-I{header.parent}", program], check=True)

sources = "\n".join(file.read_text() for file in rust.rglob("*.rs"))
for name, fields in structs.items():
    match = re.search(rf"#\[repr\(C\)\]\npub struct {name} {{\n(.*?)\n}}", sources, flags=re.S)
    assert match, f"{name} is not in {rust}"
    own = re.findall(r"^    (?:pub )?(\w+):", match[1], flags=re.M)
    assert own == [field for field, _ in fields], f"{name}: the header has {fields}, Rust {own}"

for name, value in constants:
    print(f"constant {name} {value}")
for name, fields in structs.items():
    for at, (field, kind) in enumerate(fields):
        print(f"struct {name} {8 * at} {field}: {kind}")
for declared in callbacks:
    print(f"callback {declared}")
for name in sorted(functions):
    print(f"function {functions[name]}")
