"""Graphs without their weights, small enough to carry, and the weights made again where the graph is to run.

A weight's values are random numbers that its parameter's name seeds, or come from a file of parameters. An exported graph holds most
parameters as they are or with their axes in another order; `strip` finds which by their bytes, and `fill` writes them where the graph
says. So PyTorch's model and every graph, in float32 and float16, have the same weights wherever they are made. All values are float16's:
rounding a graph to it changes none of them, and what a comparison shows is arithmetic.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from dqe_engine.processors import available_cpus

Floats = NDArray[np.float32]
Values = Callable[[str, Sequence[int]], Floats]
"""The values of a parameter, by its name and shape."""
_SCALE = 0.02  # BLIP-2's own initialisation
_SMALL = 1024  # numbers: what is smaller stays in the graph
_ALIGNMENT = 4096  # bytes: ONNX Runtime maps such weights instead of reading them


def random_values(name: str, shape: Sequence[int]) -> Floats:
    """N(0, 0.02), and around 1 for the scales of normalisations, rounded to float16."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape), np.float32) * np.float32(_SCALE)
    if len(shape) == 1 and name.endswith("weight"):
        values += 1
    return values.astype(np.float16).astype(np.float32)


def strip(source: Path, path: Path, shapes: Mapping[str, Sequence[int]], values: Values) -> dict[str, Any]:
    """Write the graph `source` to `path` without the weights that are parameters; returns what `fill` needs beside it.

    Weights that are none, because the export folded something into them, stay in the graph.
    """
    proto = onnx.load(source)
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16)
    wanted = {t.name: t for t in proto.graph.initializer if math.prod(t.dims) > _SMALL and t.data_type in kinds}
    dtypes = {helper.tensor_dtype_to_np_dtype(t.data_type) for t in wanted.values()}
    known: dict[bytes, str] = {}
    for name, shape in shapes.items():
        array = values(name, shape)
        known |= {_digest(array.astype(dtype, copy=False)): name for dtype in dtypes}
    taken, end = {}, 0
    for name, tensor in wanted.items():
        array = numpy_helper.to_array(tensor)
        for axes in itertools.permutations(range(array.ndim)):
            parameter = known.get(_digest(array.transpose(axes)))
            if parameter is not None:
                taken[name] = {"parameter": parameter, "axes": axes}
                _send_out(tensor, f"{path.name}.data", end, array.nbytes)
                end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
                break
    path.write_bytes(proto.SerializeToString())
    return {"bytes": end, "weights": taken}


def _send_out(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    for field in ("float_data", "int32_data"):
        tensor.ClearField(field)
    tensor.raw_data = b""  # which the next line wants to see
    set_external_data(tensor, location=location, offset=offset, length=length)
    tensor.ClearField("raw_data")


def fill(files: Mapping[Path, Path], filled: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Sequence[int]], values: Values,
         each: Callable[[str, Floats], None]) -> None:  # fmt: skip
    """Write the graphs `files` (from, to) with their weights. `filled`: what `strip` returned, by file name.

    Every parameter of `shapes` is made once, by as many threads as there are processors, and handed to `each`, which sets PyTorch's.
    """
    places: dict[str, list[tuple[int, onnx.TensorProto, tuple[int, ...], int]]] = defaultdict(list)
    open_files = []
    try:
        for source, path in files.items():
            proto = onnx.load(source, load_external_data=False)
            shutil.copyfile(source, path)
            open_files.append(file := os.open(path.with_name(f"{path.name}.data"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644))
            os.truncate(file, filled[source.name]["bytes"])
            weights = filled[source.name]["weights"]
            for tensor in proto.graph.initializer:
                if tensor.name in weights:
                    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
                    places[weights[tensor.name]["parameter"]].append((file, tensor, tuple(weights[tensor.name]["axes"]), offset))

        def make(name: str) -> None:
            array = values(name, shapes[name])
            each(name, array)
            for file, tensor, axes, offset in places[name]:
                _write(file, _ordered(array, tensor, axes), offset)

        with ThreadPoolExecutor(available_cpus()) as pool:
            for _ in pool.map(make, shapes):
                pass
    finally:
        for file in open_files:
            os.close(file)


def _ordered(array: Floats, tensor: onnx.TensorProto, axes: tuple[int, ...]) -> NDArray[Any]:
    """A parameter as the initializer `tensor` holds it: `tensor.transpose(axes)` has the parameter's bytes."""
    stored = array.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type), copy=False)
    return np.ascontiguousarray(stored.reshape([tensor.dims[axis] for axis in axes]).transpose(np.argsort(axes)))


def _write(file: int, array: NDArray[Any], offset: int) -> None:
    data = array.reshape(-1).view(np.uint8).data
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _digest(array: NDArray[Any]) -> bytes:
    """Of the bytes in the order of the axes; the shape does not count."""
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()


def unfilled(path: Path, filled: Mapping[str, Any]) -> Iterable[str]:
    """Names of large weights that stayed in the graph."""
    kept = onnx.load(path, load_external_data=False).graph.initializer
    return [t.name for t in kept if math.prod(t.dims) > _SMALL and t.name not in filled["weights"]]
