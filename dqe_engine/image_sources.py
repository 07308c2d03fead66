"""Images to index: a folder, a mapping or paths become (id, image) pairs, decoded ahead of the encoder by threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .contracts.preprocessing import PreprocessingSpec
from .errors import InputError
from .files import describe_os_error
from .image_policy import DEFAULT_POLICY, ImagePolicy
from .preprocessing import ImageLike, fit_image, open_image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ImageSource: TypeAlias = str | os.PathLike[str] | Mapping[str, ImageLike] | Iterable[str | os.PathLike[str]]
Pixels = NDArray[np.uint8]


def image_pairs(images: ImageSource) -> list[tuple[str, ImageLike]]:
    """(id, image) pairs, in a stable order.

    A folder is walked recursively for files with an image suffix, ids being POSIX paths relative to it; a mapping gives
    its own ids; an iterable of paths uses each path, as given, as its id. Raises InputError for anything else.
    """
    if isinstance(images, Mapping):
        return list(images.items())
    if isinstance(images, str | os.PathLike):
        folder = Path(images)
        if not folder.is_dir():
            raise InputError(f"{folder}: not a folder of images; pass a folder, a mapping from id to image, or several paths")
        return [(file.relative_to(folder).as_posix(), file) for file in _walk(folder)]
    pairs: list[tuple[str, ImageLike]] = []
    for path in images:
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"expected image paths, got {type(path).__name__}; images in memory need ids: pass a mapping from id to image")
        pairs.append((Path(path).as_posix(), Path(path)))
    return pairs


def _walk(folder: Path) -> list[Path]:
    found = []
    for directory, _, names in os.walk(folder, onerror=_unreadable):
        found += [Path(directory, name) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise InputError(describe_os_error(error)) from error


def decode_ahead(
    pairs: Sequence[tuple[str, ImageLike]], spec: PreprocessingSpec, *, ahead: int, threads: int, policy: ImagePolicy = DEFAULT_POLICY
) -> Generator[tuple[str, Pixels | InputError]]:
    """Decoded and resized images in order, (image_size, image_size, 3) uint8, or the error where one cannot be read.

    At most `ahead` images are held at a time; Pillow releases the interpreter lock, so `threads` decode in parallel.
    """

    def decode(image: ImageLike) -> Pixels | InputError:
        try:
            return fit_image(open_image(image, spec, policy), spec)
        except InputError as error:
            return error

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[str, Future[Pixels | InputError]]] = deque()
        upcoming = iter(pairs)
        try:
            while True:
                while len(waiting) < ahead and (pair := next(upcoming, None)) is not None:
                    waiting.append((pair[0], pool.submit(decode, pair[1])))
                if not waiting:
                    return
                id, future = waiting.popleft()
                yield id, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
