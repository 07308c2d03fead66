"""Images to index: a folder, a mapping or paths become (id, image) pairs, decoded ahead of the encoder by threads."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from .contracts.preprocessing import PreprocessingSpec
from .errors import InputError
from .files import describe_os_error
from .image_policy import DEFAULT_POLICY, SNIFFED, ImagePolicy, open_regular
from .preprocessing import ImageLike, fit_image, open_image

_NAMED_AS_IMAGES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
})  # fmt: skip
"""A file of such a name is taken for an image whatever it holds: what cannot be read is an error, and not passed over."""
_COMPANION, _NO_IMAGE, _NO_FILE, _UNREADABLE, _LINKED = (
    "companions of macOS (._*)", "not an image", "not a regular file", "not readable", "linked folders (not followed)",
)  # fmt: skip
ImageSource: TypeAlias = str | os.PathLike[str] | Mapping[str, ImageLike] | Iterable[str | os.PathLike[str]]
Pixels = NDArray[np.uint8]
Result = TypeVar("Result")


@dataclass(frozen=True)
class FoundImages:
    """pairs: (id, file) of a folder, ids being POSIX paths relative to it, sorted by path. passed_over: what else lies there and is
    not a folder, how many by reason."""

    pairs: list[tuple[str, ImageLike]]
    passed_over: dict[str, int]

    def describe_passed_over(self) -> str:
        """`3 skipped: 2 companions of macOS (._*), 1 not an image`; empty where there is none."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.passed_over.items()))
        return f"{sum(self.passed_over.values())} skipped: {counts}" if counts else ""


def find_images(folder: Path, policy: ImagePolicy = DEFAULT_POLICY) -> FoundImages:
    """Walk a folder for images: files named as such, and others that begin as one of the policy's formats does.

    Raises InputError where this is no folder, or one in it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder of images; pass a folder, a mapping from id to image, or several paths")
    found, passed_over = list[Path](), Counter[str]()
    for directory, folders, names in os.walk(folder, onerror=_unreadable):
        passed_over[_LINKED] += sum(Path(directory, name).is_symlink() for name in folders)
        for file in (Path(directory, name) for name in names):
            if (reason := _reason_to_pass_over(file, policy)) is None:
                found.append(file)
            else:
                passed_over[reason] += 1
    return FoundImages([(file.relative_to(folder).as_posix(), file) for file in sorted(found)], {k: n for k, n in passed_over.items() if n})


def _reason_to_pass_over(file: Path, policy: ImagePolicy) -> str | None:
    named = file.suffix.lower() in _NAMED_AS_IMAGES
    if named and not file.name.startswith("._"):
        return None
    try:
        with open_regular(file) as stream:
            start = stream.read(SNIFFED)
    except InputError:
        return _NO_FILE
    except OSError:
        return _UNREADABLE
    if policy.recognise(start) is not None:
        return None
    return _COMPANION if start.startswith(b"\0\5\x16\7") else None if named else _NO_IMAGE


def image_pairs(images: ImageSource, policy: ImagePolicy = DEFAULT_POLICY) -> list[tuple[str, ImageLike]]:
    """(id, image) pairs, in a stable order.

    A folder is walked as by `find_images`; a mapping gives its own ids; an iterable of paths uses each path, as given, as its id.
    Raises InputError for anything else.
    """
    if isinstance(images, Mapping):
        return list(images.items())
    if isinstance(images, str | os.PathLike):
        return find_images(Path(images), policy).pairs
    pairs: list[tuple[str, ImageLike]] = []
    for path in images:
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"expected image paths, got {type(path).__name__}; images in memory need ids: pass a mapping from id to image")
        pairs.append((Path(path).as_posix(), Path(path)))
    return pairs


def _unreadable(error: OSError) -> None:
    raise InputError(describe_os_error(error)) from error


def decode_ahead(
    pairs: Sequence[tuple[str, ImageLike]], spec: PreprocessingSpec, *, ahead: int, threads: int, policy: ImagePolicy = DEFAULT_POLICY
) -> Generator[tuple[str, Pixels | InputError]]:
    """Decoded and resized images in order, (image_size, image_size, 3) uint8, or the error where one cannot be read.

    At most `ahead` images are held at a time.
    """

    def decode(image: ImageLike) -> Pixels | InputError:
        try:
            return fit_image(open_image(image, spec, policy), spec)
        except InputError as error:
            return error

    yield from map_ahead(decode, pairs, ahead=ahead, threads=threads)


def map_ahead(
    work: Callable[[ImageLike], Result], pairs: Iterable[tuple[str, ImageLike]], *, ahead: int, threads: int
) -> Generator[tuple[str, Result]]:
    """(id, what `work` makes of the image), in order, at most `ahead` at a time.

    Pillow and hashing release the interpreter lock, so `threads` work in parallel. What `work` raises is raised here.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[str, Future[Result]]] = deque()
        upcoming = iter(pairs)
        try:
            while True:
                while len(waiting) < ahead and (pair := next(upcoming, None)) is not None:
                    waiting.append((pair[0], pool.submit(work, pair[1])))
                if not waiting:
                    return
                id, future = waiting.popleft()
                yield id, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
