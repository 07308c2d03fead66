"""A safetensors file written one tensor at a time: the library's own writer takes all of them at once, and copies them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Piece(NamedTuple):
    """A tensor to be written; `read` is called when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_safetensors(path: Path, pieces: list[Piece]) -> Iterator[str]:
    """Write `pieces` in order; yields the name of each before it is read. Files are of the format that `safe_open` reads."""
    header, offset = {}, 0
    for piece in pieces:
        size = torch.Size(piece.shape).numel() * piece.dtype.itemsize
        header[piece.name] = {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            yield piece.name
            tensor = piece.read()
            assert (tuple(tensor.shape), tensor.dtype) == (piece.shape, piece.dtype), piece.name
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
