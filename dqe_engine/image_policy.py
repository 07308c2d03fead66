"""`ImagePolicy`: which images a process takes and what one may cost it; its bytes are read and recognised here, nothing is decoded."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, features

from .errors import InputError

_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
_FIRST_BYTES: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda start: start.startswith(b"\xff\xd8\xff"),
    "PNG": lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"),
    "WEBP": lambda start: start[:4] == b"RIFF" and start[8:12] == b"WEBP",
    "GIF": lambda start: start.startswith((b"GIF87a", b"GIF89a")),
    "BMP": lambda start: start.startswith(b"BM"),
    "TIFF": lambda start: start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    "AVIF": lambda start: start[4:8] == b"ftyp" and start[8:12] in _AVIF_BRANDS,
}
"""The formats that this runtime decodes without help, by how their files begin. None of Pillow's decoders for them starts a program
or reads another file; other decoders of Pillow do (EPS runs Ghostscript)."""
_BY_PLUGIN = ("HEIF",)
"""Formats for which a package has to register a decoder with Pillow (`pillow_heif.register_heif_opener()`)."""
SNIFFED = 16
"""How many bytes of a file tell its format."""


@dataclass(frozen=True)
class ImagePolicy:
    """The images that an engine accepts. A policy belongs to the process that serves, not to the bundle: a model does not know who uploads.

    With the defaults, none of the hostile images of the tests takes more than 256 MiB (docs/images.md has the measurements).

    - `formats`: names of formats as Pillow has them. Only the first frame, or a JPEG's first picture ("MPO"), is read. AVIF counts only
      if this Pillow decodes it. "HEIF" may be listed once a plugin is registered.
    - `max_pixels`: the most pixels, width times height, by the header.
    - `max_bytes`: the largest file.
    - `max_memory`, `max_seconds`: the most bytes and the longest time on one core that reading and decoding an image may take, by an
      estimate from its header (`estimate_cost`).
    - `to_srgb`: convert images whose ICC profile differs from sRGB; otherwise profiles are ignored, as transformers ignores them. A
      damaged profile is always ignored.

    Raises InputError for a format that cannot be listed, and limits that are not positive.
    """

    formats: tuple[str, ...] = tuple(_FIRST_BYTES)
    max_pixels: int = 50_000_000
    max_bytes: int = 32 << 20
    max_memory: int = 240 << 20
    max_seconds: float = 1.0
    to_srgb: bool = True

    def __post_init__(self) -> None:
        known = (*_FIRST_BYTES, *_BY_PLUGIN)
        if not isinstance(self.formats, tuple) or not self.formats or not set(self.formats) <= set(known):
            raise InputError(f"formats must be a tuple of some of {', '.join(known)}, got {self.formats!r}")
        for limit in ("max_pixels", "max_bytes", "max_memory", "max_seconds"):
            if not getattr(self, limit) > 0:
                raise InputError(f"{limit} must be positive, got {getattr(self, limit)}")

    @property
    def usable_formats(self) -> tuple[str, ...]:
        """Those of `formats` that this process can decode."""
        return tuple(name for name in self.formats if _is_usable(name))

    def recognise(self, start: bytes) -> str | None:
        """The format of a file that begins with these bytes (`SNIFFED` are enough), None for one that the policy does not list."""
        return next((name for name in self.formats if _begins_as(name, start) and _is_usable(name)), None)

    def check_size(self, width: int, height: int) -> None:
        """Raise InputError, which does not name the image, for a size that is refused whatever the format."""
        if width * height > self.max_pixels:
            raise InputError(f"{width} x {height} pixels, more than the limit of {self.max_pixels}; scale it down first")
        if width == 0 or height == 0:
            raise InputError(f"an empty image of {width} x {height} pixels; expected at least 1 x 1")

    def check_cost(self, memory: int, seconds: float, description: str) -> None:
        """Raise InputError for an image (`description`) that would cost more than `max_memory` or `max_seconds`."""
        remedy = "scale it down, or save it as a baseline JPEG"
        if memory > self.max_memory:
            limit = f"needs about {memory >> 20} MiB to decode, more than the limit of {self.max_memory >> 20}"
            raise InputError(f"{description}: {limit}; {remedy}")
        if seconds > self.max_seconds:
            raise InputError(f"{description}: takes about {seconds:.1f} s to decode, more than the limit of {self.max_seconds:g}; {remedy}")

    def read(self, source: str | os.PathLike[str] | bytes) -> tuple[str, bytes]:
        """Format and bytes of an image file.

        Raises InputError, which does not name it, for a format that is not listed, more than `max_bytes`, and for anything that is no
        regular file (a pipe that nobody writes to would be waited for for ever); OSError. None of these is read whole.
        """
        if isinstance(source, bytes):
            kind = self._require_format(source[:SNIFFED])
            self._check_bytes(len(source))
            return kind, source
        with open_regular(source) as stream:
            kind = self._require_format(stream.read(SNIFFED))
            size = os.fstat(stream.fileno()).st_size
            self._check_bytes(size)
            stream.seek(0)
            return kind, stream.read(size)  # and no more, where the file grows meanwhile

    def _require_format(self, start: bytes) -> str:
        kind = self.recognise(start)
        if kind is None:
            raise InputError(f"not an image of an accepted format; save it as {', '.join(self.usable_formats)}")
        return kind

    def _check_bytes(self, size: int) -> None:
        if size > self.max_bytes:
            raise InputError(f"{size} bytes, more than the limit of {self.max_bytes}; compress it or scale it down first")


DEFAULT_POLICY = ImagePolicy()


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read, at once whatever it is. Raises InputError, which does not name it, for what is no regular file; OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        if not stat.S_ISREG(mode):
            raise InputError("not a regular file; expected an image file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _is_usable(name: str) -> bool:
    if name == "AVIF":
        return bool(features.check("avif"))
    return name not in _BY_PLUGIN or name in Image.OPEN


def _begins_as(name: str, start: bytes) -> bool:
    if name in _FIRST_BYTES:
        return _FIRST_BYTES[name](start)
    accept = Image.OPEN[name][1] if name in Image.OPEN else None  # a plugin's
    return accept is not None and accept(start[:SNIFFED]) is True
