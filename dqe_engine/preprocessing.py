"""Pillow and NumPy preprocessing, equal to the bit to transformers' BlipImageProcessor (tests/engine/test_preprocessing.py)."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from .contracts.preprocessing import PreprocessingSpec
from .errors import InputError
from .files import describe_os_error
from .image_metadata import JPEG, PNG, without_metadata

ImageLike = Image.Image | str | os.PathLike[str] | bytes

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""By EXIF orientation."""
_MOST_BYTES = 256 << 20
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _describe(source: ImageLike) -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return "<PIL image>" if isinstance(source, Image.Image) else os.fspath(source)


def open_image(source: ImageLike, spec: PreprocessingSpec) -> Image.Image:
    """Decode to upright RGB: EXIF orientation applied, greys scaled to 8 bits, alpha composited onto `spec.background`.

    Greys: Pillow's "I;16" (16 bits) by 255 / 65535. "I" (32 bits) and "F" (floating point) do not say which value is white: it is
    1 for "F" where none is above it, else 255 where none is above that, else 65535; what lies outside is clipped.

    Raises InputError for a missing or unreadable file, a truncated image, or more than `spec.max_pixels` pixels (read
    from the header, before anything is decoded). Malformed metadata (EXIF, texts, profiles) is no reason to refuse pixels.
    """
    name = _describe(source)
    try:
        if isinstance(source, Image.Image):
            return _decode(source, name, spec)
        try:
            return _decode_file(io.BytesIO(source) if isinstance(source, bytes) else source, name, spec)
        except Exception as error:
            if isinstance(error, (InputError, *_TOO_LARGE)) or getattr(error, "errno", None):
                raise
            if (bare := _without_metadata(source)) is None:
                raise
        return _decode_file(io.BytesIO(bare), name, spec)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such image file") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a directory, expected an image file") from error
    except PermissionError as error:
        raise InputError(describe_os_error(error, name)) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that Pillow can read") from error
    except _TOO_LARGE as error:  # Pillow's own limits, where lower than ours
        raise InputError(f"{name}: more pixels than the limit of {spec.max_pixels}; scale it down first") from error
    except Exception as error:  # hostile bytes make Pillow's plugins raise struct.error, IndexError, zlib.error and others
        raise InputError(f"{name}: damaged or truncated image ({error})") from error


def _without_metadata(source: str | os.PathLike[str] | bytes) -> bytes | None:
    """None also for more than `_MOST_BYTES`: what Pillow refuses is read whole here, which no file that is no image may cost."""
    if isinstance(source, bytes):
        return without_metadata(source) if len(source) <= _MOST_BYTES else None
    with open(source, "rb") as stream:
        start = stream.read(len(PNG))
        if not start.startswith((PNG, JPEG)) or os.fstat(stream.fileno()).st_size > _MOST_BYTES:
            return None
        return without_metadata(start + stream.read())


def _decode_file(file: str | os.PathLike[str] | io.BytesIO, name: str, spec: PreprocessingSpec) -> Image.Image:
    with Image.open(file) as image:
        return _decode(image, name, spec)


def _decode(image: Image.Image, name: str, spec: PreprocessingSpec) -> Image.Image:
    width, height = image.size
    if width * height > spec.max_pixels:
        raise InputError(f"{name}: {width} x {height} pixels, more than the limit of {spec.max_pixels}; scale it down first")
    if width == 0 or height == 0:
        raise InputError(f"{name}: an image of {width} x {height} pixels has no content")
    image.load()
    return _to_rgb(_upright(image), spec.background)


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF says. `ImageOps.exif_transpose` also rewrites the EXIF, and fails where that is malformed."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as hostile as pixels
        orientation = 1
    turn = _TURNS.get(orientation)
    return image.copy() if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        white = _white(image.mode, values.max(initial=0, where=np.isfinite(values)))
        grey = np.clip(np.nan_to_num(values * (255 / white)), 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _white(mode: str, largest: float) -> float:
    """The value that is white; see `open_image`."""
    if mode == "F" and largest <= 1:
        return 1.0
    return 255.0 if mode in ("I", "F") and largest <= 255 else 65535.0


def fit_image(image: Image.Image, spec: PreprocessingSpec) -> NDArray[np.uint8]:
    """Pad, resize and crop (what the spec says) an RGB image to (image_size, image_size, 3) uint8.

    Raises InputError for one so narrow that it would have more than `spec.max_pixels` pixels when it is padded.
    """
    if spec.fit == "target_pad_crop":
        return np.asarray(_crop_centre(_resize_shorter(_pad_evenly(image, spec), spec), spec.image_size))
    if spec.fit == "target_pad":
        longer, shorter = max(image.size), min(image.size)
        if longer / shorter > spec.target_ratio:
            wanted = int(longer / spec.target_ratio)
            width, height = (max(side, wanted) for side in image.size)
            image = _on_canvas(image, (width, height), ((width - image.width) // 2, (height - image.height) // 2), spec)
    size = (spec.image_size, spec.image_size)
    return np.asarray(image if image.size == size else image.resize(size, _RESAMPLE[spec.resample]))


def _pad_evenly(image: Image.Image, spec: PreprocessingSpec) -> Image.Image:
    """The shorter side padded by as much on both ends, so that longer / shorter is `target_ratio`, or a little more where
    rounding down leaves it so."""
    wanted = max(image.size) / spec.target_ratio
    left, top = (max(int((wanted - side) / 2), 0) for side in image.size)
    if left == top == 0:
        return image
    return _on_canvas(image, (image.width + 2 * left, image.height + 2 * top), (left, top), spec)


def _on_canvas(image: Image.Image, size: tuple[int, int], place: tuple[int, int], spec: PreprocessingSpec) -> Image.Image:
    width, height = size
    if width * height > spec.max_pixels:  # a sliver within the limit can take any amount of memory when it is padded
        raise InputError(
            f"an image of {image.width} x {image.height} pixels, padded to {width} x {height}, has more than the limit of "
            f"{spec.max_pixels}; crop it first"
        )
    canvas = Image.new("RGB", size, spec.background)
    canvas.paste(image, place)
    return canvas


def _resize_shorter(image: Image.Image, spec: PreprocessingSpec) -> Image.Image:
    """The shorter side to `image_size`, the longer in proportion, rounded down (torchvision's rule)."""
    shorter = min(image.size)
    width, height = (spec.image_size * side // shorter for side in image.size)
    return image if image.size == (width, height) else image.resize((width, height), _RESAMPLE[spec.resample])


def _crop_centre(image: Image.Image, size: int) -> Image.Image:
    """The middle square; where one pixel is over, an odd half is rounded to even (torchvision's rule)."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def normalise(pixels: NDArray[np.uint8], spec: PreprocessingSpec) -> NDArray[np.float32]:
    """(..., H, W, 3) uint8 to (..., 3, H, W) float32: scaled to [0, 1], then mean and standard deviation per channel."""
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    values = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def preprocess(images: Sequence[ImageLike], spec: PreprocessingSpec) -> NDArray[np.float32]:
    """Images of any size and mode to `pixel_values`: (B, 3, H, W) float32, C-contiguous. Raises InputError."""
    if not images:
        return np.empty((0, 3, spec.image_size, spec.image_size), np.float32)
    return normalise(np.stack([fit_image(open_image(image, spec), spec) for image in images]), spec)
