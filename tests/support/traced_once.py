"""Tracing takes 95 % of a tiny model's export, so that equal modules are traced once, and replayed afterwards: in this run of pytest, and
in later ones as long as our code and the packages that trace are the same.

`torch.onnx.export` alone is replaced: what our exporter does before and after it runs every time. Tests that trace by themselves, or
replay something else (replayed_export.py), replace it in their turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from support.shared import REPOSITORY, digest_of, kept

_OWN_HASH = ("_parameters", "_buffers", "_modules")
_TRACERS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "peft")
_SOURCES = ("dqe_engine", "training/dqe_training", "export/dqe_export")


@contextmanager
def traced_once(factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inside, `torch.onnx.export` remembers. Within itself it changes nothing: several folders' fixtures ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(torch.onnx.export, "remembers"):
            patch.setattr(torch.onnx, "export", _remembering(torch.onnx.export, factory))
        yield


def _remembering(trace: Callable[..., Any], factory: pytest.TempPathFactory) -> Callable[..., Any]:
    def export(module: torch.nn.Module, *args: Any, kwargs: Mapping[str, torch.Tensor] | None = None, **options: Any) -> Any:
        if kwargs is None:  # not as our exporter asks
            return trace(module, *args, **options)

        key = digest_of(trace_key(module, kwargs, options), _everything_else())

        def write(path: Path) -> None:
            onnx.save(trace(module, kwargs=kwargs, **options).model_proto, path)

        return SimpleNamespace(model_proto=onnx.load(kept(factory, "graph", key, write)))

    export.remembers = True  # type: ignore[attr-defined]
    return export


@cache
def _everything_else() -> str:
    """What a graph depends on and no module shows: our own code, that of the helpers too, and the packages."""
    files = [Path(__file__), *(file for source in _SOURCES for file in sorted((REPOSITORY / source).rglob("*.py")))]
    return digest_of(*(f"{name} {version(name)}" for name in _TRACERS), *map(str, files), files=files)


def trace_key(module: torch.nn.Module, kwargs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> str:
    """The same for what is traced to the same graph: classes, their code, settings, weights, inputs and options.

    What it cannot compare has an address in its representation, and so is equal to nothing.
    """
    key = hashlib.sha256(repr(sorted(options.items())).encode())
    for name, part in module.named_modules():
        settings = {name: value for name, value in vars(part).items() if name not in _OWN_HASH}
        key.update(repr((name, type(part), type(part).forward.__code__.co_code, _ordered(settings))).encode())
        key.update(getattr(getattr(part, "config", None), "_attn_implementation", "").encode())
    tensors = (*module.named_parameters(), *module.named_buffers(), *kwargs.items())
    for name, tensor in tensors:
        key.update(repr((name, tensor.dtype, tensor.shape)).encode())
        key.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return key.hexdigest()[:32]


def _ordered(value: Any) -> Any:
    """The same with sets as sorted lists: transformers keeps names in sets, whose order differs from process to process."""
    if isinstance(value, set | frozenset):
        return ["set", *sorted(map(repr, value))]
    if type(value) is dict:
        return {name: _ordered(part) for name, part in value.items()}
    return value
