"""Images of a dataset as arrays: decoded and resized once by worker processes, in the order asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.preprocessing import fit_image, open_image

_CHUNK = 256


def _load_chunk(paths: Sequence[Path], spec: PreprocessingSpec) -> NDArray[np.uint8]:
    return np.stack([fit_image(open_image(path, spec), spec) for path in paths])


def load_pixels(
    directory: Path, names: Sequence[str], spec: PreprocessingSpec, *, advance: Callable[[int], None] = lambda n: None
) -> NDArray[np.uint8]:
    """(N, H, W, 3) uint8, resized by `spec`. Raises InputError naming the first image that is missing or unreadable."""
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{directory}: {len(missing)} of {len(names)} images are missing: {shown}")
    pixels = np.empty((len(names), spec.image_size, spec.image_size, 3), np.uint8)
    paths = [directory / name for name in names]
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    load = partial(_load_chunk, spec=spec)
    filled = 0
    with ExitStack() as stack:
        results: Iterator[NDArray[np.uint8]] = map(load, chunks)
        if len(chunks) > 2:  # a small set is not worth starting workers for
            # torch's threads do not survive a fork, so workers start from a clean server process
            pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(chunks)), mp_context=get_context("forkserver"))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(load, chunks)
        for chunk in results:
            pixels[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
            advance(len(chunk))
    return pixels


def to_pixel_values(pixels: NDArray[np.uint8], spec: PreprocessingSpec) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32, normalised: torch's twin of `dqe_engine.preprocessing.normalise`."""
    values = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().double() * (1 / 255)).float()  # as there: equal to the bit
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (spec.mean, spec.std))
    return (values - mean) / std
