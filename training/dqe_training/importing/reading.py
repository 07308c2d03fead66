"""Files of published weights, opened without running what is in them: tensors by name, each read when it is asked for."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dqe_engine.errors import CheckpointError
from dqe_engine.files import describe_os_error, require_regular

from ..backbone.weights import reading_weights

SAFETENSORS = ".safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_MOST_NAMES = 100_000
"""More than any model of this family has."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: `read` gives its values, from the file's pages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class WeightFile:
    """The tensors of one file by name. `wrapper`: the key that they lie under in the file, "" where they are all that it holds."""

    path: Path
    wrapper: str
    tensors: Mapping[str, Stored]


def open_weights(path: Path) -> WeightFile:
    """Open a safetensors file, or one of `torch.save`, as data alone and mapped, not loaded. Raises CheckpointError, one line.

    A dictionary that holds one dictionary of tensors beside numbers and texts is taken for that one: `{"model": …}`, `{"epoch": 7,
    "ClassName": …}`.
    """
    try:
        require_regular(path)
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from error
    if path.suffix == SAFETENSORS:
        return WeightFile(path, "", _safetensors(path))
    wrapper, state = _unwrapped(path, _load(path))
    return WeightFile(path, wrapper, {name: _held(tensor) for name, tensor in state.items()})


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"needs {found[1]} to be read" if found else f"is no file of tensors ({_line(error)})"
        raise CheckpointError(
            f"{path}: {what}, which could run code, so it is not loaded; where you trust it, save its state_dict() alone with torch.save"
        ) from error
    except OSError as error:
        raise CheckpointError(describe_os_error(error, path)) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError and others for damaged files
        raise CheckpointError(
            f"{path}: not a file that torch.save wrote since PyTorch 1.6, or damaged ({_line(error)}); copy it again, or save it again"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _unwrapped(path: Path, content: Any) -> tuple[str, dict[str, Tensor]]:
    if _is_state(content):
        return "", content
    if isinstance(content, dict):
        inside = {str(name): value for name, value in content.items() if _is_state(value)}
        if len(inside) > 1:
            inside = {name: state for name, state in inside.items() if name != "optimizer"}
        if len(inside) == 1:
            return next(iter(inside.items()))
        raise CheckpointError(f"{path}: expected one dictionary of tensors, found {', '.join(inside) or 'none'}; save the right one alone")
    raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a dictionary of tensors; save a state_dict()")


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and 0 < len(value) <= _MOST_NAMES
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _held(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _safetensors(path: Path) -> dict[str, Stored]:
    with reading_weights(path), safe_open(path, framework="pt") as stream:
        found = {}
        for name in stream.keys():  # noqa: SIM118 (not a mapping)
            part = stream.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{path}: {name} is of type {part.get_dtype()}; {', '.join(_DTYPES)} are read")
            found[name] = Stored(tuple(part.get_shape()), dtype, _reader(path, name))
        return found


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with reading_weights(path), safe_open(path, framework="pt") as stream:
            tensor: Tensor = stream.get_tensor(name)
            return tensor

    return read


def under(prefix: str, names: Mapping[str, Stored]) -> Iterator[str]:
    """The names that begin with `prefix`."""
    return (name for name in names if name.startswith(prefix))
