"""libt5gemma through ctypes. The declarations are parsed from t5gemma.h in this package, so none is written twice.
Functions of a ctypes.CDLL release the interpreter lock while they run."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any, Callable, TypeVar

O = TypeVar("O", bound="Owner")
HERE = Path(__file__).parent
NUMBERS = {
    "size_t": ctypes.c_size_t,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "t5g_code": ctypes.c_int32,
    "t5g_severity": ctypes.c_int32,
    "double": ctypes.c_double,
    "void": None,
}


class Error(Exception):
    """An error of the library: `code` is one of T5G_ERROR_…, `field` the argument or option at fault.

    With T5G_ERROR_FULL, `retry_after` is the number of seconds after which to try again.
    """

    def __init__(self, code: int, message: str, field: str | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code, self.field, self.retry_after = code, field, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is made from its args, which hold the message only.
        return type(self), (self.code, str(self), self.field, self.retry_after), self.__dict__


def of_type(declared: str, returned: bool = False) -> Any:
    """The ctypes type of a declaration such as `const int64_t *tokens`."""
    if "*" not in declared:
        words = declared.replace("const ", "").split()
        return NUMBERS.get(words[0], ctypes.c_void_p)
    is_text = re.match(r"const char \*\w*$", declared.strip())
    return ctypes.c_char_p if is_text and returned else ctypes.c_void_p


class Header:
    """The declarations of t5gemma.h, and the library."""

    def __init__(self) -> None:
        text = (HERE / "t5gemma.h").read_text(encoding="utf-8")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        text = re.sub(r"static inline .*?\n}\n", "", text, flags=re.S)
        self.constants = {name: int(value) for name, value in re.findall(r"\b(T5G_[A-Z0-9_]+) (?:= )?(\d+)\b", text)}
        self.structs: dict[str, type[ctypes.Structure]] = {}
        self.callbacks: dict[tuple[str, str], Any] = {}
        for body, name in re.findall(r"typedef struct t5g_\w+ {(.*?)} (t5g_\w+);", text, flags=re.S):
            self.structs[name] = type(name, (ctypes.Structure,), {"_fields_": list(self._fields(name, body))})
        self._library = ctypes.CDLL(str(library_file()))
        for returned, name, arguments in re.findall(r"^([\w ]+[ *]+)(t5g_\w+)\(([^()]*)\);", text, flags=re.M):
            function = getattr(self._library, name)
            # A text may contain zeros and is read by its size.
            function.restype = ctypes.c_void_p if name == "t5g_text_data" else of_type(returned, returned=True)
            given = [] if arguments == "void" else arguments.split(",")
            function.argtypes = [self._argument(argument.strip()) for argument in given]
            setattr(self, name, function)

    @staticmethod
    def _argument(declared: str) -> Any:
        return ctypes.c_void_p if declared.startswith("t5g_log ") else (
            ctypes.c_char_p if re.match(r"const char \*\w+$", declared) else of_type(declared)
        )

    def _fields(self, struct: str, body: str) -> Any:
        for declared in (part.strip() for part in re.sub(r"\s+", " ", body).split(";")):
            function = re.match(r"(\w+) \(\*(\w+)\)\((.*)\)$", declared)
            if function:
                returned, name, arguments = function.groups()
                types = [of_type(argument.strip()) for argument in arguments.split(",")]
                self.callbacks[struct, name] = ctypes.CFUNCTYPE(of_type(returned), *types)
                yield name, ctypes.c_void_p
            elif declared:
                kind, names = re.match(r"((?:const )?\w+)(?: const)? ?(.*)$", declared).groups()
                for name in names.split(","):
                    is_text = kind == "const char" and re.match(r"\s*\*\w+$", name) and struct != "t5g_piece"
                    pointer = ctypes.c_char_p if is_text else ctypes.c_void_p
                    yield name.split("*")[-1].strip(), pointer if "*" in name else NUMBERS[kind]


def library_file() -> Path:
    """The file named by T5GEMMA_LIBRARY, or the one in the package."""
    named = os.environ.get("T5GEMMA_LIBRARY")
    if named:
        return Path(named)
    for name in ("libt5gemma.so", "libt5gemma.dylib"):
        if (HERE / name).exists():
            return HERE / name
    raise ImportError(f"expected libt5gemma in {HERE} or named by T5GEMMA_LIBRARY, found neither")


def use_installed_onnxruntime() -> None:
    """Selects the library of the package `onnxruntime` if none is named and none is next to libt5gemma."""
    if os.environ.get("ORT_DYLIB_PATH") or list(library_file().resolve().parent.glob("libonnxruntime.*")):
        return
    found = importlib.util.find_spec("onnxruntime")
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(folder, "capi").glob("libonnxruntime.*")):
            os.environ["ORT_DYLIB_PATH"] = str(file)
            return


use_installed_onnxruntime()
C = Header()
if C.t5g_abi_version() >> 16 != C.constants["T5G_ABI_MAJOR"]:
    raise ImportError(f"expected ABI {C.constants['T5G_ABI_MAJOR']}, found {C.t5g_abi_version() >> 16} in {library_file()}")


def filled(struct: str, **fields: Any) -> ctypes.Structure:
    """A struct with its size and the given fields; the others are unset."""
    made = C.structs[struct]()
    is_options = struct in ("t5g_open_options", "t5g_generation_options", "t5g_engine_options")
    for name, kind in made._fields_:
        if is_options and kind is ctypes.c_int64:
            setattr(made, name, -(2**63))
        if is_options and kind is ctypes.c_double:
            setattr(made, name, math.nan)
    made.size = ctypes.sizeof(made)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def interrupt_again() -> None:
    """Repeats a Ctrl-C that came in a finalizer, where Python prints a KeyboardInterrupt and goes on, once that has returned."""
    # A signal to the thread also ends a wait that it is in by then.
    again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    again.daemon = True
    again.start()


class Handle:
    """A handle, which is freed once: explicitly, or when nothing refers to it any more.

    In the child of a fork it is not freed, because freeing waits for threads of the parent.
    """

    __slots__ = ("_age", "_free", "_process", "number")
    age = 0
    """Number of forks while the library was in use, so that locks may be held forever in the child."""
    # In the class, because module globals may be gone during interpreter shutdown.
    _of_now = staticmethod(os.getpid)
    _interrupt_again = staticmethod(interrupt_again)

    def __init__(self, number: int, free: Callable[[int], Any]) -> None:
        self.number: int | None = number
        self._free, self._process, self._age = free, self._of_now(), Handle.age

    @property
    def is_of_this_process(self) -> bool:
        return self._process == self._of_now()

    @property
    def is_locked(self) -> bool:
        return self._age != Handle.age

    def check_process(self, name: str, owner: Any) -> None:
        """Raises an error in the child of a fork, in which nothing that the engines of the parent do arrives."""
        if not self.is_of_this_process:
            found = "was made before a fork, and its engine is in the parent: make one in the child"
            raise Error(C.constants["T5G_ERROR_CLOSED"], f"{name}: this {type(owner).__name__} {found}", name)

    def free(self) -> None:
        number, self.number = self.number, None
        if number is not None and self.is_of_this_process:
            self._free(number)

    def __del__(self) -> None:
        try:
            self.free()
        except KeyboardInterrupt:
            self._interrupt_again()


class Owner:
    """An object of the library, freed when it is closed or when nothing refers to it any more."""

    _name: str
    """The name of arguments of this type."""
    _after_fork = "good"
    """Use in the child of a fork: allowed, an error, or allowed only if the library was not in use at the fork."""
    _held: Handle | None = None

    def __init__(self, handle: Handle) -> None:
        self._held = handle

    @property
    def _handle(self) -> int:
        code = "T5G_ERROR_CLOSED"
        if self._held is None or self._held.number is None:
            code, found = "T5G_ERROR_HANDLE", "is closed"
        elif self._after_fork == "refused" and not self._held.is_of_this_process:
            found = "was made before a fork, and its threads are in the parent: make one in the child"
        elif self._after_fork == "as it was" and self._held.is_locked:
            found = "was in use in the parent at the fork: make one in the child"
        else:
            return self._held.number
        message = f"{self._name}: this {type(self).__name__} {found}"
        raise Error(C.constants[code], message, self._name)

    def _check(self) -> None:
        """Raises an error unless the object can be used here."""
        _ = self._handle

    def close(self) -> None:
        """Frees the object; running calls finish normally. Closing twice is allowed."""
        if self._held is not None:
            self._held.free()

    def __enter__(self: O) -> O:
        self._check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        kind = type(self).__name__
        raise TypeError(f"cannot copy or pickle {kind}: it belongs to the process that made it")


def callback(struct: str, field: str) -> Callable[[Callable[..., Any]], Any]:
    """The type of a callback."""
    return C.callbacks[struct, field]


def call(function: Any, *arguments: Any, out: bool = True) -> Any:
    """Calls a fallible function and returns the handle in its last, output argument."""
    given = ctypes.c_void_p()
    error = function(*arguments, *([ctypes.byref(given)] if out else []))
    if error:
        raise failure(error)
    return given.value


def failure(error: int) -> Error:
    """An error of the library as an exception; the error is freed."""
    field = C.t5g_error_field(error)
    message, after = C.t5g_error_message(error).decode(), C.t5g_error_retry_after(error)
    made = Error(C.t5g_error_code(error), message, field.decode() if field else None, after)
    C.t5g_error_free(error)
    return made


def take_text(function: Any, *arguments: Any) -> str:
    """Returns the text that a function outputs."""
    text = call(function, *arguments)
    try:
        return ctypes.string_at(C.t5g_text_data(text), C.t5g_text_size(text)).decode()
    finally:
        C.t5g_text_free(text)
