"""The arrays of a call, held against a graph's spec with one model's sizes put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contracts.graphs import GraphSizes, GraphSpec
from .device_tokens import Tokens
from .errors import InputError

Arrays = dict[str, NDArray[Any]]
"""A graph's inputs or outputs by name."""


class Binding:
    """Names, dtypes and shapes of one model's graph, put together once: a call's check is a part of every query."""

    def __init__(self, spec: GraphSpec, sizes: GraphSizes) -> None:
        self._graph = spec.name
        self._names = frozenset(tensor.name for tensor in spec.inputs)
        self._inputs = tuple((tensor.name, np.dtype(tensor.dtype), tensor.sized(sizes)) for tensor in spec.inputs)
        self._outputs = tuple((tensor.name, tensor.sized(sizes)) for tensor in spec.outputs)

    def dynamic_sizes(self, inputs: Mapping[str, Tokens]) -> dict[str, int]:
        """Sizes of the dynamic axes. Raises InputError for inputs that the graph does not take."""
        if inputs.keys() != self._names:
            raise InputError(f"{self._graph} takes {', '.join(sorted(self._names))}; got {', '.join(sorted(inputs)) or 'nothing'}")
        dynamic: dict[str, int] = {}
        for name, dtype, axes in self._inputs:
            array = inputs[name]
            if array.dtype != dtype:
                raise InputError(f"{self._graph}.{name}: expected {dtype}, got {array.dtype}")
            fits = len(array.shape) == len(axes)
            if fits:
                for axis, size in zip(axes, array.shape, strict=True):
                    fits = size == (dynamic.setdefault(axis, size) if isinstance(axis, str) else axis) and fits
            if not fits:
                expected = ", ".join(str(dynamic.get(axis, axis) if isinstance(axis, str) else axis) for axis in axes)
                raise InputError(f"{self._graph}.{name}: expected shape ({expected}), got {array.shape}")
        return dynamic

    def output_shapes(self, dynamic: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Of every output by name, in the spec's order."""
        return {name: tuple([dynamic[axis] if isinstance(axis, str) else axis for axis in axes]) for name, axes in self._outputs}
