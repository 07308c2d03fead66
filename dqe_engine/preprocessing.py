"""Pillow and NumPy preprocessing, equal to the bit to transformers' BlipImageProcessor (tests/engine/test_preprocessing.py) for images of
up to `EXACT_PIXELS` without a foreign colour profile."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from .contracts.preprocessing import PreprocessingSpec
from .errors import InputError
from .files import describe_os_error
from .image_cost import estimate_cost
from .image_metadata import MOST_PROFILE, exif_orientation, without_metadata
from .image_policy import DEFAULT_POLICY, ImagePolicy

if TYPE_CHECKING:
    from .colour_profiles import ToSRGB

ImageLike = Image.Image | os.PathLike[str] | bytes
"""A `str` is none: whether it names a file or an item, only its caller can know."""

EXACT_PIXELS = 1 << 24
"""Larger images are shrunk by a whole factor to this many pixels before anything else; equality to transformers ends there."""
_CONVERTED_PIXELS = 1 << 22
"""The same where colours are converted: that takes 20 to 30 ns a pixel, more with tables as printers have them."""
_PADDED_PIXELS = 1 << 25
_STRIP_PIXELS = 1 << 20

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""By EXIF orientation."""
_MODES_OF_PROFILE = {"RGB": ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA"), "L": ("L",), "CMYK": ("CMYK",)}
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_PLUGINS = {"TIFF": "PIL.TiffImagePlugin", "WEBP": "PIL.WebPImagePlugin", "AVIF": "PIL.AvifImagePlugin"}
"""Of formats whose decoder Pillow loads only when asked for it, or for all at once."""
_TURNED_BY_PILLOW = ("TIFF", "HEIF")
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_WHITE = (255, 255, 255)
_REDUCED_AS_THEY_ARE = ("L", "LA", "RGB", "RGBA", "CMYK")
_GREY_OF_16_BITS = ((np.arange(65536, dtype=np.uint32) + 128) // 257).astype(np.uint8)
"""255 / 65535 times each value, rounded."""


_LOADING = threading.Lock()


def open_image(source: ImageLike, spec: PreprocessingSpec, policy: ImagePolicy = DEFAULT_POLICY) -> Image.Image:
    """Decode to upright RGB: EXIF orientation applied, greys scaled to 8 bits, alpha composited onto `spec.background`, colours
    converted to sRGB where the policy says so and a profile asks for it.

    Images of more than `EXACT_PIXELS` are shrunk by a whole factor, JPEGs while they are decoded.
    Greys: Pillow's "I;16" (16 bits) by 255 / 65535. "I" (32 bits) and "F" (floating point) do not say which value is white: it is
    1 for "F" where none is above it, else 255 where none is above that, else 65535; what lies outside is clipped.

    Raises InputError, one line, for what the policy refuses (told from the header, before anything is decoded), and for a missing,
    unreadable or truncated image. Malformed metadata (EXIF, texts, profiles) is no reason to refuse pixels.
    A PIL image was opened by the caller: the policy's formats and bytes say nothing of it.
    """
    with _errors_told(_describe(source), policy):
        if isinstance(source, Image.Image):
            return _decode_given(source, spec, policy)
        return _decode_file(*policy.read(source), spec, policy)


def open_reduced(data: bytes, side: int, policy: ImagePolicy = DEFAULT_POLICY) -> Image.Image:
    """Decode the bytes of a file to be looked at: upright, in sRGB, its longer side at most `side`, without any metadata. RGBA where
    something shines through, else RGB.

    As little is decoded as can be: JPEGs are shrunk while they are. Raises InputError as `open_image` does.
    """
    with _errors_told(_describe(data), policy):
        kind, data = policy.read(data)
        image, orientation, to_srgb = _load(kind, data, policy, side)
        factor = max(1, max(image.size) // (2 * side))
        if _has_alpha(image):
            small = _to_rgba(image, factor)
            if small.getchannel("A").getextrema() == (255, 255):
                small = small.convert("RGB")
        else:
            small = _to_rgb(image, _WHITE, factor, to_srgb)
            to_srgb = None
        small = _shrunk(small, side)
        if to_srgb is not None and to_srgb.mode == "RGB":
            colours = to_srgb(small.convert("RGB"))
            if small.mode == "RGBA":
                colours.putalpha(small.getchannel("A"))
            small = colours
        small = _turned(small, orientation)
        small.info.clear()
        return small


@contextlib.contextmanager
def _errors_told(name: str, policy: ImagePolicy) -> Iterator[None]:
    """Whatever an image makes of its decoder, as an InputError that names the image."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such image file") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a directory, expected an image file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that Pillow can read") from error
    except _TOO_LARGE as error:  # Pillow's own limits, where lower than ours
        raise InputError(f"{name}: more pixels than the limit of {policy.max_pixels}; scale it down first") from error
    except MemoryError as error:
        raise InputError(
            f"{name}: not enough memory to decode it; scale it down, or lower the policy's max_memory, which refuses such images"
        ) from error
    except Exception as error:  # hostile bytes make Pillow's plugins raise struct.error, IndexError, zlib.error and others
        if isinstance(error, OSError) and error.errno:
            raise InputError(describe_os_error(error, name)) from error
        raise InputError(f"{name}: damaged or truncated image ({' '.join(str(error).split())})") from error


def _describe(source: ImageLike) -> str:
    """Raises InputError for anything that is no image."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return "<PIL image>"
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if isinstance(source, str):
        message = "is a str, not an image; pass Path(...) for a file; an item of the index is reference_id=..."
        raise InputError(f"{source!r} {message}")
    raise InputError(f"expected an image (Path, bytes or PIL image), got {type(source).__name__}")


def _decode_file(kind: str, data: bytes, spec: PreprocessingSpec, policy: ImagePolicy) -> Image.Image:
    image, orientation, to_srgb = _load(kind, data, policy, None)
    return _turned(_to_rgb(image, spec.background, _factor(image.size, to_srgb), to_srgb), orientation)


def _load(kind: str, data: bytes, policy: ImagePolicy, side: int | None) -> tuple[Image.Image, int, ToSRGB | None]:
    """Pixels as the file has them, how to turn them (see `_TURNS`), and how to convert their colours.

    A JPEG is shrunk while it is decoded as far as the result allows: to `side` pixels on its longer side, twice that at least; without
    it, to what `_factor` says."""
    if kind in _PLUGINS:
        importlib.import_module(_PLUGINS[kind])
    bare, in_file = without_metadata(data, kind), len(data)
    del data
    image: Image.Image = Image.open(io.BytesIO(bare.data), formats=[kind])
    policy.check_size(*image.size)
    size = image.size
    to_srgb = _conversion(image, bare.profile or image.info.get("icc_profile"), policy)
    factor = _factor(size, to_srgb) if side is None else max(1, max(size) // (2 * side))
    if kind == "JPEG" and factor > 1:
        image.draft(None, (max(image.width // factor, 1), max(image.height // factor, 1)))
        factor = _factor(image.size, to_srgb) if side is None else max(1, max(image.size) // (2 * side))
    result_pixels = image.width * image.height // factor**2
    cost = estimate_cost(image, size[0] * size[1], result_pixels, bare, in_file, converted=to_srgb is not None)
    policy.check_cost(cost.memory, cost.seconds, f"{kind} of {size[0]} x {size[1]} pixels")
    image.load()
    orientation = 1 if kind in _TURNED_BY_PILLOW else exif_orientation(bare.exif or image.info.get("exif", b""))
    return image, orientation, to_srgb


def _decode_given(image: Image.Image, spec: PreprocessingSpec, policy: ImagePolicy) -> Image.Image:
    policy.check_size(*image.size)
    with _LOADING:  # an image that was opened and not yet read has one file, whoever reads it
        image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as hostile as pixels
        orientation = 1
    to_srgb = _conversion(image, image.info.get("icc_profile"), policy)
    return _turned(_to_rgb(image, spec.background, _factor(image.size, to_srgb), to_srgb), orientation)


def _conversion(image: Image.Image, profile: bytes | None, policy: ImagePolicy) -> ToSRGB | None:
    """None where there is nothing to convert."""
    if not profile or not policy.to_srgb or len(profile) > MOST_PROFILE:
        return None
    from .colour_profiles import load_profile  # and with it Pillow's ImageCms, which few processes need

    found = load_profile(profile)
    return found if found is not None and image.mode in _MODES_OF_PROFILE[found.mode] else None


def _factor(size: tuple[int, int], to_srgb: ToSRGB | None) -> int:
    """By which whole number an image of this size is shrunk."""
    return _whole_factor(size, EXACT_PIXELS if to_srgb is None else _CONVERTED_PIXELS)


def _whole_factor(size: tuple[int, int], most_pixels: int) -> int:
    return math.ceil(math.sqrt(max(size[0] * size[1] / most_pixels, 1)))


def _turned(image: Image.Image, orientation: object) -> Image.Image:
    """`ImageOps.exif_transpose` also rewrites the EXIF, and fails where that is malformed."""
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, background: tuple[int, int, int], factor: int, to_srgb: ToSRGB | None) -> Image.Image:
    """A copy, strip by strip: what lies between one mode and the next (RGBA has 4 bytes a pixel, and compositing it needs three
    such images) is never held whole."""
    width, height = image.size
    result = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    strips = _strips(image.size, factor)
    white = _white(image.mode, (image.crop(box) for _, box in strips)) if image.mode in ("I", "F") else 65535.0
    for top, box in strips:
        strip = image.crop(box)
        if "transparency" in strip.info:
            strip = strip.convert("RGBA")
        if factor > 1 and strip.mode in _REDUCED_AS_THEY_ARE:  # the sooner, the fewer pixels
            strip, left = strip.reduce(factor), 1
        else:
            left = factor
        if to_srgb is None or to_srgb.mode != strip.mode:
            strip = _strip_to_rgb(strip, background, white)
        if left > 1:
            strip = strip.reduce(left)
        result.paste(strip if to_srgb is None else to_srgb(strip), (0, top // factor))
    return result


def _to_rgba(image: Image.Image, factor: int) -> Image.Image:
    """The same with what shines through."""
    width, height = image.size
    result = Image.new("RGBA", (math.ceil(width / factor), math.ceil(height / factor)))
    for top, box in _strips(image.size, factor):
        strip = image.crop(box).convert("RGBA")
        result.paste(strip if factor == 1 else strip.reduce(factor), (0, top // factor))
    return result


def _strips(size: tuple[int, int], factor: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(top, box) of strips of some MiB whose heights, but for the last, are multiples of `factor`."""
    width, height = size
    rows = max(_STRIP_PIXELS // width // factor, 1) * factor
    return [(top, (0, top, width, min(top + rows, height))) for top in range(0, height, rows)]


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _WITH_ALPHA or "transparency" in image.info


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """At most `side` on its longer side, in proportion."""
    longer = max(image.size)
    if longer <= side:
        return image
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _strip_to_rgb(image: Image.Image, background: tuple[int, int, int], white: float) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_GREY_OF_16_BITS[np.asarray(image)]).convert("RGB")
    if image.mode == "I":
        values = np.clip(np.asarray(image), 0, int(white))
        return Image.fromarray(values.astype(np.uint8) if white == 255 else _GREY_OF_16_BITS[values]).convert("RGB")
    if image.mode == "F":
        values = np.clip(np.nan_to_num(np.asarray(image), nan=0.0), 0, white) * np.float32(255 / white)
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.mode in _WITH_ALPHA:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _white(mode: str, strips: Iterable[Image.Image]) -> float:
    """The value that is white in an image of mode "I" or "F"; see `open_image`."""
    values = (np.asarray(strip) for strip in strips)
    largest = max(float(v.max(initial=0, where=np.isfinite(v))) for v in values)
    if mode == "F" and largest <= 1:
        return 1.0
    return 255.0 if largest <= 255 else 65535.0


def fit_image(image: Image.Image, spec: PreprocessingSpec) -> NDArray[np.uint8]:
    """Pad, resize and crop (what the spec says) an RGB image to (image_size, image_size, 3) uint8.

    One so narrow that it would be padded to more than 32 Mpx is shrunk by a whole factor before.
    """
    if spec.fit == "target_pad_crop":
        return np.asarray(_crop_centre(_resize_shorter(_padded(image, _even_padding, spec), spec), spec.image_size))
    if spec.fit == "target_pad":
        image = _padded(image, _padding_to_ratio, spec)
    size = (spec.image_size, spec.image_size)
    return np.asarray(image if image.size == size else image.resize(size, _RESAMPLE[spec.resample]))


_Padding = Callable[[tuple[int, int], float], tuple[tuple[int, int], tuple[int, int]]]
"""From an image's size and a ratio to the size of the canvas and the image's place on it."""


def _even_padding(size: tuple[int, int], ratio: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shorter side padded by as much on both ends, so that longer / shorter is `ratio`, or a little more where rounding down
    leaves it so."""
    wanted = max(size) / ratio
    left, top = (max(int((wanted - side) / 2), 0) for side in size)
    return (size[0] + 2 * left, size[1] + 2 * top), (left, top)


def _padding_to_ratio(size: tuple[int, int], ratio: float) -> tuple[tuple[int, int], tuple[int, int]]:
    wanted = int(max(size) / ratio) if max(size) / min(size) > ratio else 0
    width, height = (max(side, wanted) for side in size)
    return (width, height), ((width - size[0]) // 2, (height - size[1]) // 2)


def _padded(image: Image.Image, padding: _Padding, spec: PreprocessingSpec) -> Image.Image:
    size, place = padding(image.size, spec.target_ratio)
    if size == image.size:
        return image
    if (factor := _whole_factor(size, _PADDED_PIXELS)) > 1:  # a sliver within the limit can take any amount of memory when it is padded
        image = image.reduce(factor)
        size, place = padding(image.size, spec.target_ratio)
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


def preprocess(images: Sequence[ImageLike], spec: PreprocessingSpec, policy: ImagePolicy = DEFAULT_POLICY) -> NDArray[np.float32]:
    """Images of any size and mode to `pixel_values`: (B, 3, H, W) float32, C-contiguous. Raises InputError."""
    if not images:
        return np.empty((0, 3, spec.image_size, spec.image_size), np.float32)
    return normalise(np.stack([fit_image(open_image(image, spec, policy), spec) for image in images]), spec)
