"""Images of a dataset as arrays: decoded and resized once by threads, in the order asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.preprocessing import fit_image, open_image
from dqe_engine.processors import available_cpus

from .damage import describe_damage

_CHUNK = 64


def _load_chunk(directory: Path, spec: PreprocessingSpec, names: Sequence[str]) -> tuple[list[NDArray[np.uint8]], dict[str, str]]:
    """The images that can be read, in order, and what is wrong with the others, by name."""
    pixels, damaged = [], {}
    for name in names:
        try:
            pixels.append(fit_image(open_image(directory / name, spec), spec))
        except InputError as error:
            damaged[name] = str(error).removeprefix(f"{directory / name}: ")
    return pixels, damaged


def require_images(directory: Path, names: Sequence[str]) -> None:
    """Raise InputError that counts and names the images that are not there."""
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{directory}: {len(missing)} of {len(names)} images are missing: {shown}; add them, or leave out what names them")


def load_pixels(
    directory: Path, names: Sequence[str], spec: PreprocessingSpec, *, advance: Callable[[int], None] = lambda n: None
) -> NDArray[np.uint8]:
    """(N, H, W, 3) uint8, resized by `spec`. Raises InputError that counts the images which are missing or cannot be read."""
    require_images(directory, names)
    pixels = np.empty((len(names), spec.image_size, spec.image_size, 3), np.uint8)
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    filled = 0
    damaged: dict[str, str] = {}
    # Pillow decodes and resizes without the interpreter's lock. Worker processes would each import torch first, and break
    # in scripts without a `__main__` guard.
    pool = ThreadPoolExecutor(available_cpus())
    try:
        for chunk, (loaded, problems) in zip(chunks, pool.map(partial(_load_chunk, directory, spec), chunks), strict=True):
            damaged |= problems
            for image in loaded:
                pixels[filled] = image
                filled += 1
            advance(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
    if damaged:
        raise InputError(describe_damage(directory, damaged, len(names)))
    return pixels


def to_pixel_values(pixels: NDArray[np.uint8], spec: PreprocessingSpec) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32, normalised: torch's twin of `dqe_engine.preprocessing.normalise`."""
    values = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().double() * (1 / 255)).float()  # as there: equal to the bit
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (spec.mean, spec.std))
    return (values - mean) / std
