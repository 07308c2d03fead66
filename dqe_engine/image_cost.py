"""What decoding an image will take, told from its header: peak memory, and time on one core.

The figures are of Pillow 13 with its bundled libraries, on an AVX2 core at about 2.5 GHz; measured over hostile and over ordinary
files, and rounded up. They only have to tell a photograph from a bomb.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from .image_metadata import BareImage

_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Per pixel; 4 in every other mode."""
_KEPT_BYTES = {"WEBP": 12, "AVIF": 8, "HEIF": 12}
"""Bytes per pixel that a decoder holds until the image is dropped."""
_PASSING_BYTES = {"TIFF": 8}
"""Bytes per pixel that it holds while it decodes: a TIFF's strip may be the whole image, and is held before and after it is turned."""
_NANOSECONDS = {
    "JPEG": (4, 20), "PNG": (6, 20), "GIF": (12, 30), "BMP": (20, 0), "TIFF": (25, 20), "WEBP": (40, 50), "AVIF": (28, 80),
    "HEIF": (40, 80),
}  # fmt: skip
"""Per pixel of the file and per byte of it."""
_PER_DECODED_PIXEL, _PER_SCAN, _PER_UNPACKED_BYTE, _PER_PIXEL_WITH_ALPHA, _PER_CONVERTED_PIXEL = 18, 1, 2.5, 16, 30
"""More nanoseconds: a JPEG's, by pixels after it was shrunk and by pixels times scans; a PNG's; of what is composited; of colours that
are converted."""


@dataclass(frozen=True)
class Cost:
    memory: int
    """Bytes at the peak, with the file's own."""
    seconds: float


def estimate_cost(image: Image.Image, pixels: int, result_pixels: int, bare: BareImage, file_bytes: int, *, converted: bool) -> Cost:
    """image: opened and not loaded, a JPEG set to shrink; pixels: of the file; result_pixels: after shrinking; bare: what the decoder
    is given; file_bytes: of the file as it came; converted: whether its colours are."""
    kind, decoded = image.format or "", image.width * image.height
    held = file_bytes + (len(bare.data) if bare.data_is_copy else 0) + _KEPT_BYTES.get(kind, 0) * pixels
    passing = _PASSING_BYTES.get(kind, 0) * pixels + int(bare.held * pixels)
    memory = held + decoded * _MODE_BYTES.get(image.mode, 4) + max(passing, 4 * result_pixels)

    per_pixel, per_byte = _NANOSECONDS[kind]
    nanoseconds = per_pixel * pixels + per_byte * file_bytes
    if kind == "JPEG":
        nanoseconds += _PER_DECODED_PIXEL * decoded + _PER_SCAN * bare.scans * pixels
    nanoseconds += int(_PER_UNPACKED_BYTE * bare.unpacked * pixels)
    if "A" in image.mode or "transparency" in image.info:
        nanoseconds += _PER_PIXEL_WITH_ALPHA * pixels
    if converted:
        nanoseconds += _PER_CONVERTED_PIXEL * result_pixels
    return Cost(memory, nanoseconds / 1e9)
