"""Image files without their metadata: for those that Pillow refuses because of a text, a profile or a checksum beside the pixels."""

from __future__ import annotations

import zlib

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"


def without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG file with what decides its pixels and how they are turned, nothing else. None for other formats.

    Damage to the rest stays: what does not decode before does not decode after.
    """
    if data.startswith(PNG):
        return _bare_png(data)
    return _bare_jpeg(data) if data.startswith(JPEG) else None


def _bare_png(data: bytes) -> bytes:
    parts, at = [PNG], len(PNG)
    while at < len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        critical = kind[:1].isupper()
        whole = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if critical or kind == b"tRNS" or (kind == b"eXIf" and whole):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _bare_jpeg(data: bytes) -> bytes:
    parts, at = [JPEG], len(JPEG)
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):  # up to the start of a scan
        marker, content = data[at + 1], data[at + 4 : at + 10]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        # APP0 (JFIF) and APP14 (Adobe) say what the components are; APP1 may hold the orientation.
        comment = marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE)
        if not comment or (marker == 0xE1 and content == b"Exif\0\0"):
            parts.append(data[at:end])
        at = end
    return b"".join([*parts, data[at:]])
