"""Opens models with ONNX Runtime's log: which weights each session reads where they are given to it, and which it refuses.

    weights_once.py MODEL...

Prints a JSON object for each: {"used": [names], "refused": [names]}, a name as often as sessions said so.
"""

import ctypes
import json
import re
import sys

import t5gemma
from t5gemma._library import C, call

INFO = 1
lines = []
log = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)(
    lambda user, severity, message: lines.append(message.decode())
)
call(C.t5g_log_set, INFO, ctypes.cast(log, ctypes.c_void_p), None, out=False)


def named(begin):
    found = (re.search(begin + r" \(([^)]*)\)", line) for line in lines)
    return [match[1] for match in found if match]


for folder in sys.argv[1:]:
    lines.clear()
    t5gemma.Model.open(folder).close()
    used = named("Using user supplied initializer with name")
    print(json.dumps({"used": used, "refused": named("Cannot use user supplied initializer with name:")}))
