"""A float16 or int8 graph beside the float32 graph that it was made from: rounding changes weights by half a step, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from dqe_engine.contracts.graphs import GraphSpec
from dqe_engine.errors import ParityError

_SMALLEST = 1e-7
"""What ONNX Runtime's conversion lifts smaller numbers to, next to float16's smallest."""


class _Weights:
    """The weights of a graph by name, read one at a time: a large graph's are in a file beside it."""

    def __init__(self, path: Path) -> None:
        proto = onnx.load(path, load_external_data=False)
        self._folder = str(path.parent)
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.nodes = proto.graph.node
        self.used = {name for node in self.nodes for name in node.input}
        self._made_by = {name: node for node in self.nodes for name in node.output}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def size(self, name: str) -> int:
        return math.prod(self._tensors[name].dims) if name in self._tensors else 0

    def made_of(self, name: str, given: Collection[str]) -> set[str]:
        """The weights that the tensor `name` is computed from, and those of `given` that it is; what these are made of is not followed."""
        found, seen, waiting = set[str](), set[str](), [name]
        while waiting:
            node = self._made_by.get(waiting.pop())
            for other in () if node is None else set(node.input) - seen:
                seen.add(other)
                if other in self._tensors or other in given:
                    found.add(other)
                else:
                    waiting.append(other)
        return found

    def __getitem__(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self._tensors[name], self._folder)


def check_conversion(spec: GraphSpec, source: Path, path: Path) -> None:
    """Hold `path` to the float32 graph `source`, which was held to PyTorch: what kept its name and type is equal to the bit, what became
    float16 is the nearest, and what became 8 bits lies beside its scale under its name, as ONNX Runtime's tools and `row_int8` put it,
    within half a step, and is what that product or lookup takes. Vectors (biases, norms, seeds) are never taken to 8 bits. Each is
    still in use.

    Raises ParityError.
    """
    before, after = _Weights(source), _Weights(path)
    for name in before:
        where = f"{spec.name}: the weights {name}"
        wanted = before[name]
        if name not in after:
            if wanted.ndim < 2:
                raise ParityError(f"{where} were lost in the conversion; nothing was written")
            _check_steps(where, name, wanted, after)
            _check_use(where, name, before, after)
            continue
        if name not in after.used:
            raise ParityError(f"{where} are not used any more after the conversion; nothing was written")
        found = after[name]
        if found.shape != wanted.shape:
            raise ParityError(f"{where} have shape {found.shape} after the conversion, {wanted.shape} before; nothing was written")
        if found.dtype == np.float16 and wanted.dtype == np.float32:
            wanted = wanted.astype(np.float64)
            allowed = np.abs(wanted) * 2.0**-11 + _SMALLEST
            same = bool((np.abs(found.astype(np.float64) - wanted) <= allowed).all())
        else:
            same = found.dtype == wanted.dtype and np.array_equal(found, wanted)
        if not same:
            raise ParityError(f"{where} are others after the conversion, not the same rounded; nothing was written")


def _check_use(where: str, name: str, before: _Weights, after: _Weights) -> None:
    """What a product or lookup of `name` becomes is made of its inputs, of that weight in 8 bits, and of no other but single numbers."""
    parts = {f"{name}_quantized", f"{name}_scale"}
    for node in before.nodes:
        if name not in node.input:
            continue
        given = {other for other in node.input if other != name}
        found = after.made_of(node.output[0], given)
        others = {other for other in found - parts - {f"{name}_zero_point"} if after.size(other) > 1}
        if not parts <= found or not given <= found | set(before) or others:
            raise ParityError(f"{where} are not what makes {node.output[0]} after the conversion; nothing was written")


def _check_steps(where: str, name: str, wanted: NDArray[Any], after: _Weights) -> None:
    values, scale = f"{name}_quantized", f"{name}_scale"
    if values not in after or scale not in after:
        raise ParityError(f"{where} were lost in the conversion; nothing was written")
    stored, steps = after[values].astype(np.float64), after[scale].astype(np.float64)
    zero = after[f"{name}_zero_point"].astype(np.float64) if f"{name}_zero_point" in after else np.zeros(steps.shape)
    if stored.shape != wanted.shape:
        raise ParityError(f"{where} have shape {stored.shape} after the conversion, {wanted.shape} before; nothing was written")
    off = min(_steps_off(stored, steps.reshape(shape), zero.reshape(shape), wanted) for shape in _along(steps.size, wanted.shape))
    if not off <= 0.501:
        raise ParityError(f"{where} are off by up to {off:.2f} steps of their 8 bits, more than half a step; nothing was written")


def _along(count: int, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """How `count` scales may lie along a matrix: one for all, or one a channel on any axis of that length."""
    if count == 1:
        return [(1,) * len(shape)]
    return [tuple(count if i == axis else 1 for i in range(len(shape))) for axis, length in enumerate(shape) if length == count]


def _steps_off(values: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float((np.abs((values - zero) * scale - wanted) / scale).max(initial=0))
