"""Image tokens as NumPy arrays or on the device of the graphs: put together for a batch, copied for a cache, brought home."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device_arrays import CPU_DEVICE, CUDA_DEVICE, CudaMemory, ForeignArray
from .errors import BackendError, InputError, one_line

Tokens = NDArray[Any] | ForeignArray
DEVICE_NAMES = {CPU_DEVICE: "cpu", CUDA_DEVICE: "cuda"}
"""ONNX Runtime's, by DLPack's. Nothing is gained on "cpu"; it is there so that tests run what a GPU would."""


def to_host(array: Tokens) -> NDArray[Any]:
    """As a NumPy array. The only copy of tokens from a device: outputs that a graph is to leave on the host do not pass here."""
    if not isinstance(array, ForeignArray):
        return array
    if array.device[0] == CPU_DEVICE:
        return np.from_dlpack(array).copy()
    with CudaMemory.open(array.device[1]) as memory:
        return memory.download(array)


def stacked(rows: Sequence[Tokens | None], shape: tuple[int, ...]) -> Tokens:
    """(len(rows), *shape) float32 of rows of that shape, None for zeros; on the device if one of the rows is there.

    All rows of one array in their order are that array. Raises InputError for rows on two devices, BackendError where memory runs out.
    """
    resident = [row for row in rows if isinstance(row, ForeignArray)]
    if not resident:
        out = np.zeros((len(rows), *shape), np.float32)
        for place, row in zip(out, rows, strict=True):
            if row is not None:
                place[...] = row  # from the disk, perhaps
        return out
    whole, device = resident[0].owner, resident[0].device
    if other := next((row for row in resident if row.device != device), None):
        raise InputError(f"image tokens on {place_name(device)} and on {place_name(other.device)}; run all graphs on one device")
    if isinstance(whole, ForeignArray) and [row.address for row in resident] == [row.address for row in whole] and len(rows) == len(whole):
        return whole
    made = _empty((len(rows), *shape), np.dtype(np.float32), device)
    _write(made, [np.zeros(shape, np.float32) if row is None else row for row in rows])
    return made


def copied(array: Tokens) -> Tokens:
    """On the same device, in memory of its own: what is given may be a view into a batch. A batch of one is its own on a device."""
    if not isinstance(array, ForeignArray):
        return np.array(array)
    if isinstance(array.owner, ForeignArray) and array.owner.nbytes == array.nbytes:
        return array
    made = _empty((1, *array.shape), array.dtype, array.device)
    _write(made, [array])
    return made[0]


def place_name(device: tuple[int, int]) -> str:
    """For messages, such as "cuda:0"."""
    return f"{DEVICE_NAMES.get(device[0], f'DLPack device {device[0]}')}:{device[1]}"


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int]) -> ForeignArray:
    """From ONNX Runtime's allocator, as the tokens that graphs leave there: it keeps what is freed for the next."""
    from onnxruntime import OrtValue

    try:
        value = OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, DEVICE_NAMES[device[0]], device[1])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise BackendError(
            f"no memory on {place_name(device)} for image tokens of shape {shape}, pass fewer images at a time: {one_line(error)}"
        ) from error
    return ForeignArray(value.data_ptr(), shape, dtype, device, owner=value)


def _write(target: ForeignArray, rows: Sequence[Tokens]) -> None:
    hosted = [row if isinstance(row, ForeignArray) else np.ascontiguousarray(row, target.dtype) for row in rows]
    sources = [row.address if isinstance(row, ForeignArray) else row.ctypes.data for row in hosted]
    copies = [(mine.address, source, mine.nbytes) for mine, source in zip(target, sources, strict=True)]
    if target.device[0] == CPU_DEVICE:
        for place, source, size in copies:
            ctypes.memmove(place, source, size)
        return
    with CudaMemory.open(target.device[1]) as memory:
        memory.write(copies)
