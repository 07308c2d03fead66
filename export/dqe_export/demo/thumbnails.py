"""Example images as the page and the picture need them: found, decoded safely, small."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.preprocessing import open_image

LARGEST_SIDE = 192  # twice the size shown, for dense screens
_SPEC = PreprocessingSpec(image_size=LARGEST_SIDE)
_KEPT = {"JPEG": "image/jpeg", "PNG": "image/png"}


def open_thumbnail(root: str, image: str) -> Image.Image:
    """An upright RGB image of at most `LARGEST_SIDE` pixels a side. Raises InputError naming the file."""
    opened = open_image(Path(root) / image, _SPEC)
    if max(opened.size) > LARGEST_SIDE:
        opened = opened.copy()
        opened.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return opened


def data_uri(root: str, image: str) -> str:
    """`data:` URI of a thumbnail; a small upright RGB JPEG or PNG is embedded byte for byte."""
    thumbnail = open_thumbnail(root, image)
    path = Path(root) / image
    with Image.open(path) as original:
        kind = _KEPT.get(original.format or "")
        if kind and original.mode == "RGB" and original.size == thumbnail.size and not original.getexif() and path.stat().st_size < 32_768:
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    stream = io.BytesIO()
    thumbnail.save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
