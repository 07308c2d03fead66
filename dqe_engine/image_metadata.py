"""Image files without their metadata. Pillow reads what stands beside the pixels in Python, at any length, and refuses images for it;
a few kilobytes of it can cost gigabytes. So the decoder is given only what decides pixels, and the two things that matter are read here:
the EXIF orientation and the ICC profile.

The functions that walk a file raise InputError, which does not name it, for one that is made of absurdly many parts.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from .errors import InputError
from .tiff_directory import bare_tiff

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
MOST_PROFILE = 4 << 20
"""Bytes of an ICC profile; a larger one is ignored. Those of printing conditions have 2 to 3 MiB."""
_MOST_PARTS = 200_000
"""Chunks, segments or blocks of one file: a GIF of 32 MiB has 130,000 of full size."""
_MOST_HEADERS = 500
"""Segments before a JPEG's first scan that its decoder is given."""
_MOST_SCANS = 100
"""libtiff's limit for the JPEGs within a TIFF; encoders write about ten."""
_NOT_FILL = re.compile(rb"[^\xff]")
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


@dataclass(frozen=True)
class BareImage:
    """data: the file with what decides its pixels, nothing else. exif, profile: what was taken out, else empty.

    scans: how many times the decoder goes over all pixels. held: bytes per pixel that it holds from scan to scan. unpacked: bytes per
    pixel that are inflated. data_is_copy: whether `data` takes memory beside the file's.
    """

    data: bytes
    exif: bytes = b""
    profile: bytes = b""
    scans: int = 1
    held: float = 0
    unpacked: float = 0
    data_is_copy: bool = True


def without_metadata(data: bytes, kind: str) -> BareImage:
    """Damage to what decides pixels stays: what does not decode before does not decode after. Formats whose decoders leave metadata
    alone stay as they are."""
    strip = _STRIPPED.get(kind)
    return BareImage(data, data_is_copy=False) if strip is None else strip(data)


def exif_orientation(exif: bytes) -> int:
    """1 to 8: what EXIF data (a TIFF directory) says on how to turn the pixels, 1 also where it is malformed."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is not None:
            (start,) = struct.unpack_from(order + "L", exif, 4)
            (count,) = struct.unpack_from(order + "H", exif, start)
            for at in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(order + "HH", exif, at)
                if tag == 0x0112 and kind in (3, 4):
                    (value,) = struct.unpack_from(order + ("H" if kind == 3 else "L"), exif, at + 8)
                    return value if 1 <= value <= 8 else 1
    except struct.error:  # it ends early
        pass
    return 1


def _too_many(what: str) -> InputError:
    return InputError(f"made of more than {_MOST_PARTS} {what}; open it in an image editor and save it again")


def _bare_png(data: bytes) -> BareImage:
    """IHDR, PLTE and tRNS, the pixels in one chunk, and no frames of an animation."""
    view, at = memoryview(data), len(PNG)
    first: dict[bytes, memoryview] = {}
    pixels, exif, profile = list[memoryview](), b"", b""
    for _ in range(_MOST_PARTS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if not kind or kind == b"IEND":
            break
        if kind == b"IDAT":
            pixels.append(view[at + 8 : end - 4])
        elif kind in (b"IHDR", b"PLTE", b"tRNS"):
            first.setdefault(kind, view[at:end])
        elif kind == b"eXIf" and zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big"):
            exif = data[at + 8 : end - 4]
        elif kind == b"iCCP":
            profile = _inflated_profile(data[at + 8 : end - 4])
        at = end
    else:
        raise _too_many("chunks")
    parts: list[bytes | memoryview] = [PNG, *first.values()]
    if pixels:
        size, checksum = sum(map(len, pixels)), zlib.crc32(b"IDAT")
        for part in pixels:
            checksum = zlib.crc32(part, checksum)
        parts += [struct.pack(">L", size), b"IDAT", *pixels, struct.pack(">L", checksum)]
    return BareImage(b"".join([*parts, b"\0\0\0\0IEND\xaeB`\x82"]), exif, profile, unpacked=_unpacked(first.get(b"IHDR", b"")))


def _unpacked(header: bytes | memoryview) -> float:
    """Bytes per pixel that a PNG's pixels inflate to."""
    depth, colours = header[16:18] if len(header) >= 18 else (8, 6)
    return depth * {2: 3, 4: 2, 6: 4}.get(colours, 1) / 8


def _inflated_profile(content: bytes) -> bytes:
    """Empty where it is damaged or larger than `MOST_PROFILE`."""
    name_end = content.find(b"\0", 0, 80)
    try:
        profile = zlib.decompressobj().decompress(content[name_end + 2 :], MOST_PROFILE + 1)
    except zlib.error:
        return b""
    return profile if len(profile) <= MOST_PROFILE else b""


def _bare_jpeg(data: bytes) -> BareImage:
    """Frame, tables and scans, and the two segments that say what the components are: APP0 (JFIF) and APP14 (Adobe)."""
    parts, at, exif, sampling = [JPEG], len(JPEG), b"", 0.0
    profile: dict[int, bytes] = {}
    for _ in range(_MOST_PARTS):
        at = data.find(b"\xff", at)
        fill_end = _NOT_FILL.search(data, at) if at >= 0 else None
        if fill_end is None:
            return BareImage(b"".join(parts))
        at = fill_end.start() - 1
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        content = data[at + 4 : end]
        if marker in (0xDA, 0xD9):  # the first scan, or the end
            break
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # without content
            end = at + 2
        elif marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif = exif or content
        elif marker == 0xE2 and content.startswith(b"ICC_PROFILE\0") and len(content) > 14:
            profile[content[12]] = content[14:]
        elif marker in (0xE0, 0xEE) or not (marker == 0xFE or 0xE0 <= marker <= 0xEF):
            parts.append(data[at:end])
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                sampling = _sampling(content)
            if len(parts) > _MOST_HEADERS:
                raise InputError(f"a JPEG with more than {_MOST_HEADERS} tables; open it in an image editor and save it again")
        at = end
    else:
        raise _too_many("segments")
    scans = _count_scans(data, at)
    joined = b"".join(profile[n] for n in sorted(profile))
    return BareImage(b"".join([*parts, memoryview(data)[at:]]), exif, joined, scans, 2 * sampling if scans > 1 else 0)


def _sampling(frame: bytes) -> float:
    """Samples per pixel, all components together: 3 for 4:4:4, 1.5 for 4:2:0."""
    factors = [(frame[at] >> 4, frame[at] & 15) for at in range(7, min(len(frame), 6 + 3 * frame[5]), 3)] if len(frame) > 5 else []
    largest = max((across for across, _ in factors), default=1) * max((down for _, down in factors), default=1)
    return sum(across * down for across, down in factors) / max(largest, 1)


def _count_scans(data: bytes, at: int) -> int:
    """Of a JPEG from its first scan at `at` to its end, beyond which other pictures may follow."""
    scans = 0
    for _ in range(_MOST_PARTS):
        found = _MARKER.search(data, at)
        if found is None or data[found.start() + 1] in (0xD8, 0xD9):
            return scans
        at = found.start()
        scans += data[at + 1] == 0xDA
        if scans > _MOST_SCANS:
            raise InputError(f"a JPEG of more than {_MOST_SCANS} scans; save it as a baseline JPEG")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise _too_many("segments")


def _bare_gif(data: bytes) -> BareImage:
    """The first frame with its transparency, without comments and further frames."""
    at = 13 + _colours(data[10:11])
    parts, control = [data[:at]], b""
    for _ in range(_MOST_PARTS):
        kind = data[at : at + 1]
        if kind == b"!":
            end = _skip_blocks(data, at + 2)
            if data[at + 1 : at + 2] == b"\xf9":
                control = data[at:end]
            at = end
        elif kind == b",":
            start = at + 10 + _colours(data[at + 9 : at + 10])
            parts += [control, data[at : _skip_blocks(data, start + 1)]]
            break
        elif kind in (b"", b";"):
            break
        else:  # between blocks, as Pillow has it
            at += 1
    else:
        raise _too_many("blocks")
    return BareImage(b"".join([*parts, b";"]))


def _colours(flags: bytes) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> int:
    """Where the chain of sub-blocks that begins at `at` ends."""
    for _ in range(_MOST_PARTS):
        size = data[at] if at < len(data) else 0
        at += 1 + size
        if size == 0:
            return at
    raise _too_many("blocks")


def _plain_bmp(data: bytes) -> BareImage:
    """Pillow decodes run lengths in Python, 100 times slower than a copy."""
    if data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise InputError("BMP with run-length compression is not supported; save it as PNG")
    return BareImage(data, data_is_copy=False)


def _avif_without_exif(data: bytes) -> BareImage:
    """Its orientation stands outside EXIF, which Pillow parses all the same: the item is renamed, so that the decoder finds none."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"meta":
            end = at + size if size >= 8 else len(data)
            return BareImage(b"".join([data[:at], data[at:end].replace(b"Exif", b"skip"), memoryview(data)[end:]]))
        if size < 8:  # to the end, or of 64 bits
            break
        at += size
    raise InputError("damaged or truncated image (an AVIF file without its meta box); save it again")


_STRIPPED: dict[str, Callable[[bytes], BareImage]] = {
    "PNG": _bare_png,
    "JPEG": _bare_jpeg,
    "GIF": _bare_gif,
    "BMP": _plain_bmp,
    "TIFF": lambda data: BareImage(bare_tiff(data)),
    "AVIF": _avif_without_exif,
}
