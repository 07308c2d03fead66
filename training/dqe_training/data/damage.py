"""Files that have an image's name and are not images: empty, cut short, or a web page. Downloads leave them behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error
from dqe_engine.image_metadata import JPEG
from dqe_engine.image_policy import ImagePolicy, open_regular
from dqe_engine.preprocessing import open_image
from dqe_engine.processors import available_cpus

Progress = Callable[[int, int], None]
_ANY_SPEC = PreprocessingSpec(image_size=1)
_ANY_SIZE = ImagePolicy(max_pixels=1 << 40, max_bytes=1 << 40, max_memory=1 << 60, max_seconds=1e9)  # Pillow's own limit stays
_CHUNK = 64
_TAIL = 64  # bytes at the end in which a format's last word is looked for
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
_PADDING = b"\0\t\n\r "
_SHOWN = 3


def find_damaged(
    root: Path, names: Sequence[str], *, decode: bool = False, progress: Progress = lambda done, total: None
) -> dict[str, str]:
    """What is wrong with images that cannot be read, by their name under `root`, in the order given.

    The header of each file must parse, and a JPEG, PNG or WebP end as the format does; what does not is decoded, and so is every
    other format. That finds what is empty, cut or of another kind, and takes about 0.1 ms a file. `decode`: decode all of them, which
    finds damage in the middle, too, and takes some milliseconds a file. `progress` is told how many files are done, and of how many.
    How large an image may be is the model's to say, when it reads it.
    """
    found: dict[str, str] = {}
    done = 0
    pool = ThreadPoolExecutor(available_cpus())
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    try:
        for chunk, problems in zip(chunks, pool.map(partial(_problems, root, decode), chunks), strict=True):
            found |= {name: problem for name, problem in zip(chunk, problems, strict=True) if problem}
            done += len(chunk)
            progress(done, len(names))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def require_readable(root: Path, names: Sequence[str], *, progress: Progress = lambda done, total: None) -> None:
    """Raise InputError that counts the damaged images, as `find_damaged` finds them, and names the first."""
    if damaged := find_damaged(root, names, progress=progress):
        raise InputError(describe_damage(root, damaged, len(names)))


def describe_damage(root: Path, damaged: Mapping[str, str], total: int) -> str:
    """`images: 5 of 60 images cannot be read: a.jpg (empty), b.jpg (a web page), c.jpg (damaged …) and 2 more; mend, …`."""
    shown = ", ".join(f"{name} ({problem})" for name, problem in list(damaged.items())[:_SHOWN])
    more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
    return f"{root}: {len(damaged)} of {total} images cannot be read: {shown}{more}; repair, replace or leave them out"


def _problems(root: Path, decode: bool, names: Sequence[str]) -> list[str]:
    return [_problem(root / name, decode=decode) for name in names]


def _problem(path: Path, *, decode: bool) -> str:
    """Empty where there is none."""
    try:
        with open_regular(path) as stream:
            start = stream.read(_TAIL)
    except InputError as error:  # a pipe, say
        return str(error)
    except OSError as error:
        return describe_os_error(error, path).removeprefix(f"{path}: ")
    if not start:
        return "empty"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    if not decode and _begins_and_ends(path, start):
        return ""
    if start.startswith(JPEG) and _ends_in_zeros(path):
        return "cut short, zeros at its end"
    try:
        open_image(path, _ANY_SPEC, _ANY_SIZE)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def _ends_in_zeros(path: Path) -> bool:
    """Whether zeros stand where a JPEG's last word should, as an interrupted download leaves them; libjpeg decodes them to grey."""
    with open(path, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
        if stream.read().strip(b"\0"):
            return False
        stream.seek(0)
        return not stream.read().rstrip(b"\0").endswith(_JPEG_END)


def _begins_and_ends(path: Path, start: bytes) -> bool:
    """Whether the header parses and the end is the format's; where not, decoding has to decide."""
    try:
        with open(path, "rb") as stream, Image.open(stream, formats=("JPEG", "PNG", "WEBP")):
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            end = stream.read().rstrip(_PADDING)
    except Exception:  # hostile bytes make Pillow's plugins raise anything
        return False
    if start.startswith(b"RIFF"):
        return 8 + int.from_bytes(start[4:8], "little") <= size
    return end.endswith((_JPEG_END, _PNG_END))
