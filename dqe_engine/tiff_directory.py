"""A TIFF with its first page's picture alone: what a directory may make a decoder read, and in what compression, is decided before."""

from __future__ import annotations

import math
import struct

from .errors import InputError

_COMPRESSION, _PROFILE = 259, 34675
_TAGS = frozenset((
    256, 257, 258, _COMPRESSION, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347, 530,
    532, _PROFILE,
))  # fmt: skip
"""What decides pixels, their orientation and their colours."""
_COMPRESSIONS = frozenset([1, 2, 3, 4, 5, 7, 8, 32773, 32946])
"""None, CCITT, LZW, JPEG, Deflate and PackBits. LZMA takes a dictionary of any size; the others are of satellites, scanners or 1992."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MOST_ENTRIES = 4096
_MOST_TILE = 1 << 22
"""Pixels. A tile is decoded whole, however small the image; usual are 256 to 1024 a side."""
_MOST_VALUES = 1 << 21
"""Bytes of all values but the profile, such as the place of every strip: Pillow makes an object of each number."""


def bare_tiff(data: bytes) -> bytes:
    """The file with a directory of `_TAGS` only and without a next page. Raises InputError, which does not name the file."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (version,) = struct.unpack_from(order + "H", data, 2)
        number, entry, place = ("Q", "HHQ", 8) if version == 43 else ("H", "HHL", 4)
        (start,) = struct.unpack_from(order + ("Q" if version == 43 else "L"), data, place)
        (count,) = struct.unpack_from(order + number, data, start)
        if count > _MOST_ENTRIES:
            raise InputError(f"a TIFF directory of {count} entries, more than the limit of {_MOST_ENTRIES}; save it again")
        first, size = start + struct.calcsize(order + number), 20 if version == 43 else 12
        kept, values = dict[int, bytes](), 0
        for at in range(first, first + count * size, size):
            tag, kind, length = struct.unpack_from(order + entry, data, at)
            if tag in _TAGS and tag not in kept:
                kept[tag] = data[at : at + size]
                values += length * _SIZES.get(kind, 1) if tag != _PROFILE else 0
            if tag == _COMPRESSION and (compression := _number(kept[tag], order)) not in _COMPRESSIONS:
                raise InputError(f"a TIFF of compression {compression} is not read; save it with LZW or Deflate, or as PNG")
    except (struct.error, OverflowError) as error:
        raise InputError("damaged or truncated image (its TIFF directory is not within the file)") from error
    if (tile := math.prod(_number(kept[tag], order) for tag in (322, 323) if tag in kept)) > _MOST_TILE:
        raise InputError(f"a TIFF with tiles of {tile} pixels, more than the limit of {_MOST_TILE}; save it again")
    if values > _MOST_VALUES:
        raise InputError(f"a TIFF of too many strips or tiles ({values} bytes to list them, the limit is {_MOST_VALUES}); save it again")
    directory = struct.pack(order + number, len(kept)) + b"".join(kept.values()) + bytes(8 if version == 43 else 4)
    view = memoryview(data)
    return b"".join([view[:start], directory, view[start + len(directory) :]])


def _number(entry: bytes, order: str) -> int:
    """The value of an entry that holds one number in place."""
    (kind,) = struct.unpack_from(order + "H", entry, 2)
    value: int = struct.unpack_from(order + {1: "B", 3: "H", 16: "Q"}.get(kind, "L"), entry, 12 if len(entry) == 20 else 8)[0]
    return value
