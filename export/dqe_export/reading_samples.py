"""Images and texts on which careless reading shows, made up: one file per thing that a decoder, a resize or a tokenizer may miss."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112

TEXTS: Mapping[str, str] = {
    "plain": "is red and has long sleeves",
    "one word": "darker",
    "capitals": "Is RED, with Long SLEEVES",
    "accents": "a décolleté façon Zoë, naïve jalapeño",
    "combining accents": "a de\u0301collete\u0301 fac\u0327on",
    "punctuation": "v-neck, (not crew-neck)! 50% off: $9.99/pc?",
    "other scripts": "赤いドレス и красное ελληνικά",
    "emoji": "more 🔥 than 👗🏽",
    "control characters": "red\tdress\u200b with\u00a0dots\r\nand \ufffd",
    "unknown words": "antidisestablishmentarianism qwxzjk",
    "special tokens": "red [SEP] and [PAD] or [UNK]",
    "over-long": "the same but " + "very " * 700 + "red",
}


def sample_images(size: int) -> dict[str, bytes]:
    """Encoded images by what is odd about them; some smaller, some larger than a square of `size` pixels."""
    wide, tall = _noise(0, (size * 2 + 5, size - 3 if size > 8 else size + 3)), _noise(1, (size // 2 + 1, size + 9))
    alpha = _noise(2, (50, 40))
    ramp = np.linspace(0, 255, 50).astype(np.uint8)
    alpha.putalpha(Image.fromarray(np.broadcast_to(ramp, (40, 50)).copy()))
    palette = _noise(4, (33, 60)).quantize(16)
    sixteen = np.random.default_rng(5).integers(0, 65536, (41, 30)).astype(np.uint16)
    return {
        "wide": _encoded(wide, "PNG"),
        "tall": _encoded(tall, "PNG"),
        "a sliver": _encoded(_noise(6, (3, 40)), "PNG"),
        "its size exactly": _encoded(_noise(3, (size, size)), "PNG"),
        "JPEG": _encoded(_noise(7, (61, 45)), "JPEG", quality=90),
        "transparent": _encoded(alpha, "PNG"),
        "grey, transparent": _encoded(alpha.convert("LA"), "PNG"),
        "palette": _encoded(palette, "PNG"),
        "palette, transparent": _encoded(palette, "PNG", transparency=3),
        "grey": _encoded(_noise(8, (30, 44)).convert("L"), "PNG"),
        "black and white": _encoded(_noise(9, (40, 28)).convert("1"), "PNG"),
        "16 bits": _encoded(Image.fromarray(sixteen), "PNG"),
        "CMYK": _encoded(_noise(10, (36, 47)).convert("CMYK"), "TIFF"),
    } | {f"turned, EXIF {turn}": _encoded(tall, "PNG", exif=_turned(turn)) for turn in range(2, 9)}


def _noise(seed: int, size: tuple[int, int]) -> Image.Image:
    """Pixels that any other resampling changes."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
