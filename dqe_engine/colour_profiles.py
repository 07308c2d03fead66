"""ICC profiles: from the colours that a file's numbers mean to those of sRGB, in which every model here was trained."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_INPUTS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_AS_SRGB = 0.25
"""Of 255, on average over a grid of colours. Makers' sRGB profiles differ by their rounding (0.07 for a primary off by 0.0001, and up to 4
in the darkest saturated shades), Display P3 from sRGB by several."""


@dataclass(frozen=True)
class ToSRGB:
    """mode: of the images that it converts."""

    mode: str
    _transform: Any

    def __call__(self, image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image, self._transform)
        assert converted is not None  # it is None only where the image is changed in place
        return converted


@functools.lru_cache(maxsize=4)  # a profile and what is made of it may take some MiB
def load_profile(profile: bytes) -> ToSRGB | None:
    """The conversion from this profile, None where there is nothing to convert: the profile is sRGB's, by what it does to a grid of
    colours and not by its name, or is damaged, or is of another kind of image (a profile never fails an image)."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _INPUTS.get(source.profile.xcolor_space.strip().ljust(4))
        if mode is None:
            return None
        found = ToSRGB(mode, ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB"))
        grid = _grid(mode)
        changed = np.abs(np.asarray(found(grid), np.int16) - np.asarray(grid.convert("RGB"), np.int16)).mean()
    except Exception:  # as hostile as pixels: lcms and Pillow raise OSError, ValueError, PyCMSError and others
        return None
    return None if mode != "CMYK" and changed <= _AS_SRGB else found


def _grid(mode: str) -> Image.Image:
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(steps[None])
    if mode == "CMYK":
        return Image.new("CMYK", (1, 1))
    axes = np.meshgrid(steps, steps, steps, indexing="ij")
    return Image.fromarray(np.stack(axes, -1).reshape(16, -1, 3))
