"""Objects that NVIDIA's compiled bindings take for TensorRT's: tables of function pointers that lead back to Python.

An object of a class `{vptr, mImpl}` and the implementation behind it lie in one block; TensorRT's parser has no second part.
Every slot is filled. Whatever the mock does not implement, and every use of an object after its deletion, ends the process:
the function's name, which says what was called, stands at the top of the traceback that pytest prints then.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..nvidia_wheels import fetch
from .facts import LOGGER_LOG, PUBLIC_SLOTS, TABLES, VERSIONS

_TYPES: dict[str, Any] = {
    "v": None, "b": ctypes.c_bool, "i": ctypes.c_int32, "u": ctypes.c_uint32, "l": ctypes.c_int64, "s": ctypes.c_char_p,
    "p": ctypes.c_void_p,
}  # fmt: skip
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)
_PACKAGE = "tensorrt-cu13-bindings"


class Shape(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int32), ("sizes", ctypes.c_int64 * 8))

    def tuple(self) -> tuple[int, ...]:
        return tuple(self.sizes[: self.rank])


class Native:
    """One object of the interface `kind`. The bindings own it once they have its `address`; `deleted` is theirs to call."""

    kind = ""

    def __init__(self) -> None:
        tables = _Tables.loaded
        assert tables is not None
        self._kept: list[Any] = []
        self._block = (ctypes.c_void_p * 4)()
        self.address = ctypes.addressof(self._block)
        if TABLES[self.kind].plain:
            self._block[0], self._self = tables.implementations[self.kind], self.address
        else:
            self._self = self.address + 3 * ctypes.sizeof(ctypes.c_void_p)
            # A layer keeps two pointers, to what all layers have and to what its kind has.
            self._block[0], self._block[1], self._block[2] = tables.interfaces[self.kind], self._self, self._self
            self._block[3] = tables.implementations[self.kind]
        tables.objects[self.address] = tables.objects[self._self] = self

    def keep(self, text: str | bytes) -> int:
        """The address of a C string that lives as long as this object."""
        self._kept.append(ctypes.create_string_buffer(text.encode() if isinstance(text, str) else text))
        return ctypes.addressof(self._kept[-1])

    @property
    def alive(self) -> bool:
        return _Tables.loaded is not None and _Tables.loaded.objects.get(self.address) is self

    def deleted(self) -> None:
        tables = _Tables.loaded
        assert tables is not None
        for address in {self.address, self._self}:
            del tables.objects[address]
        self._block[0] = self._block[3] = tables.dead[self.kind]
        tables.graveyard.append(self._block)  # so that a later use finds that table


def native(address: int) -> Any:
    """The object at an address that came back from the bindings."""
    assert _Tables.loaded is not None
    return _Tables.loaded.objects[address]


def log(logger: int, severity: int, text: str) -> None:
    """Call the virtual function of an ILogger: the bindings' trampoline, which calls the Python override."""
    assert _Tables.loaded is not None
    table = ctypes.cast(ctypes.c_void_p.from_address(logger).value or 0, ctypes.POINTER(ctypes.c_void_p))
    _LOG(table[LOGGER_LOG[_Tables.loaded.column]])(logger, severity, text.encode())


class _Tables:
    """The function tables of one version. They live until the process ends, as its objects may."""

    loaded: _Tables | None = None

    def __init__(self, libraries: ctypes.CDLL, column: int) -> None:
        self.column, self.objects, self.graveyard = column, dict[int, Native](), list[Any]()
        self._callbacks: list[Any] = []
        libraries.mock_type.restype = ctypes.c_void_p
        self._type = libraries.mock_type()
        by_value = {
            "Ss": ctypes.cast(libraries.mock_tensor_shape, ctypes.c_void_p).value,
            "Ssii": ctypes.cast(libraries.mock_profile_shape, ctypes.c_void_p).value,
        }
        self.interfaces, self.implementations, self.dead = dict[str, int](), dict[str, int](), dict[str, int]()
        for kind, table in TABLES.items():
            slots = {method.slots[column]: (name, method.signature) for name, method in table.methods.items()}
            assert len(slots) == len(table.methods)
            filled = [self._missing(f"{kind}_slot_{slot}_is_not_in_the_mock") for slot in range(table.length[column])]
            for slot, (name, signature) in slots.items():
                filled[slot] = by_value.get(signature) or self._callback(self._dispatch(name), signature)
            gone = self._missing(f"{kind}_was_used_after_its_deletion")
            self.dead[kind] = self._table([gone] * len(filled))
            if table.plain:
                filled[table.plain[column]] = self._callback(self._dispatch("deleted"), "v")
            else:
                public = [self._missing(f"{kind}_interface_slot_{slot}_is_not_in_the_mock") for slot in range(PUBLIC_SLOTS.get(kind, 2))]
                public[1] = self._callback(self._dispatch("deleted"), "v")
                self.interfaces[kind] = self._table(public)
            self.implementations[kind] = self._table(filled)

    def _table(self, functions: list[int]) -> int:
        """A virtual table: offset to the top, type, functions. The address of the first function is what objects hold."""
        table = (ctypes.c_void_p * (len(functions) + 2))(0, self._type, *functions)
        self._callbacks.append(table)
        return ctypes.addressof(table) + 2 * ctypes.sizeof(ctypes.c_void_p)

    def _callback(self, function: Callable[..., Any], signature: str) -> int:
        made = ctypes.CFUNCTYPE(_TYPES[signature[0]], ctypes.c_void_p, *(_TYPES[letter] for letter in signature[1:]))(function)
        self._callbacks.append(made)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))  # the bindings may delete objects after Python has cleared its modules
        return ctypes.cast(made, ctypes.c_void_p).value or 0

    def _dispatch(self, name: str) -> Callable[..., Any]:
        objects = self.objects
        return _guarded(lambda self, *arguments: getattr(objects[self], name)(*arguments))

    def _missing(self, name: str) -> int:
        def abort(self: int) -> None:
            os.write(2, f"the TensorRT mock: {name}\n".encode())
            os.abort()

        abort.__code__ = abort.__code__.replace(co_name=name)
        return self._callback(abort, "v")


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Exceptions cannot pass through the bindings: they get a null pointer, False or 0, and the exception goes to
    `sys.unraisablehook`, where pytest finds it. `pytestmark = raise_what_a_callback_raises` makes it fail the test.
    """

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BaseException as error:
            raised = {"exc_type": type(error), "exc_value": error, "exc_traceback": error.__traceback__}
            sys.unraisablehook(types.SimpleNamespace(**raised, err_msg="in a function of the TensorRT mock", object=function))  # type: ignore[arg-type]
            return 0

    return call


raise_what_a_callback_raises = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


def load(version: str, create: Callable[..., int]) -> Any:
    """The module `tensorrt_bindings` of `version` over libraries that call `create(kind, first, logger, version)`.

    One version per process, since the bindings of all share pybind11's registry of types. The test is skipped where
    there is no compiler, no wheel, or another version in this process.
    """
    found = sys.modules.get("tensorrt_bindings")
    if found is not None:
        if _Tables.loaded is None or found.__version__ != version:
            pytest.skip(f"this process has imported TensorRT {found.__version__} already; the mock of {version} needs its own")
        return found
    libraries = compile_libraries(version)
    _Tables.loaded = _Tables(libraries, VERSIONS.index(version))
    hooks = _Hooks.in_dll(libraries, "mock_hooks")
    hooks.create, hooks.tensor_shape, hooks.profile_shape = _hook(0, create), _hook(1, _tensor_shape), _hook(2, _profile_shape)
    return import_bindings(version)


def import_bindings(version: str) -> Any:
    """`tensorrt_bindings` of that version: what is installed, or the wheel. Its libraries must have been loaded."""
    folder = None if _installed() == version else str(fetch(f"{_PACKAGE}=={version}"))
    sys.modules.setdefault("tensorrt_libs", None)  # type: ignore[arg-type]  # else the bindings would load the real ones
    sys.path[:0] = [folder] if folder else []
    try:
        return importlib.import_module("tensorrt_bindings")
    finally:
        if folder:
            sys.path.remove(folder)
        if sys.modules["tensorrt_libs"] is None:
            del sys.modules["tensorrt_libs"]


class _Hooks(ctypes.Structure):
    _fields_ = (
        ("create", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)),
        ("tensor_shape", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(Shape))),
        ("profile_shape", ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(Shape)
        )),
    )  # fmt: skip


def _hook(index: int, function: Callable[..., Any]) -> Any:
    made = _Hooks._fields_[index][1](_guarded(function))
    assert _Tables.loaded is not None
    _Tables.loaded._callbacks.append(made)
    return made


def _tensor_shape(address: int, tensor: bytes, shape: Any) -> None:
    _write(shape.contents, native(address).getTensorShape(tensor))


def _profile_shape(address: int, tensor: bytes, profile: int, which: int, shape: Any) -> None:
    _write(shape.contents, native(address).getProfileShape(tensor, profile, which))


def _write(shape: Shape, sizes: tuple[int, ...] | None) -> None:
    """None: TensorRT's "invalid dims"."""
    shape.rank = -1 if sizes is None else len(sizes)
    for axis, size in enumerate(sizes or ()):
        shape.sizes[axis] = size


def _installed() -> str:
    try:
        return importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""


def compile_libraries(version: str) -> ctypes.CDLL:
    """Compile the three libraries and load them under the names that the bindings ask for: the loader then takes these."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler for the libraries of the TensorRT mock")
    major = version.partition(".")[0]
    source, nothing = Path(__file__).with_name("libraries.cpp"), "/dev/null"
    loaded = []
    with tempfile.TemporaryDirectory() as folder:
        for name, file in (("nvinfer", source), ("nvinfer_plugin", nothing), ("nvonnxparser", nothing)):
            library = f"{folder}/lib{name}.so.{major}"
            command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,lib{name}.so.{major}", "-o", library, "-x", "c++", file]
            subprocess.run(command, check=True)
            loaded.append(ctypes.CDLL(library, ctypes.RTLD_GLOBAL))
    return loaded[0]
