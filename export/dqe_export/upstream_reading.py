"""Images and texts as upstream reads them: transformers' processor and tokenizer, behind decoding and padding of our own, in NumPy.

What this shares with the runtime is Pillow's file formats and resampling, and no line of ours.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dqe_engine.contracts.preprocessing import PreprocessingSpec

_Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112
_UPRIGHT: Mapping[int, Callable[[_Pixels], _Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
"""EXIF's orientations: what makes (H, W, 3) pixels upright."""
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which processors are configured with


def pixel_values(data: bytes, spec: PreprocessingSpec) -> NDArray[np.float32]:
    """One encoded image to (3, H, W) by transformers' `BlipImageProcessor`."""
    import transformers

    pixels, resize = upright_rgb(data, spec.background), True
    if spec.fit != "stretch":
        pixels = _padded(pixels, spec)
    if spec.fit == "target_pad_crop":
        pixels, resize = _cropped(pixels, spec), False
    # The one on Pillow; older versions of transformers have no other, and the name without an ending.
    kind = getattr(transformers, "BlipImageProcessorPil", None) or transformers.BlipImageProcessor
    processor = kind(
        size={"height": spec.image_size, "width": spec.image_size}, resample=_RESAMPLE[spec.resample], image_mean=list(spec.mean),
        image_std=list(spec.std), do_resize=resize, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
    )  # fmt: skip
    values: NDArray[np.float32] = np.asarray(processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"])[0]
    return values


def upright_rgb(data: bytes, background: tuple[int, int, int]) -> _Pixels:
    """(H, W, 3), turned as EXIF says, over `background` where it is transparent, 16 bits scaled to 8."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        pixels, alpha = _rgb(image)
        if alpha is not None:  # rounded to the nearest
            sums = pixels.astype(np.int64) * alpha[..., None] + np.asarray(background) * (255 - alpha[..., None].astype(np.int64))
            pixels = ((2 * sums + 255) // 510).astype(np.uint8)
        return np.ascontiguousarray(_UPRIGHT[image.getexif().get(_ORIENTATION, 1)](pixels))


def _rgb(image: Image.Image) -> tuple[_Pixels, _Pixels | None]:
    """(H, W, 3) and alpha (H, W), from an image as its file stores it."""
    stored = np.asarray(image)
    if image.mode == "RGB":
        return stored, None
    if image.mode == "RGBA":
        return stored[..., :3], stored[..., 3]
    if image.mode == "LA":
        return np.repeat(stored[..., :1], 3, axis=-1), stored[..., 1]
    if image.mode == "P":
        colours = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[stored]
        if (clear := image.info.get("transparency")) is None:
            return colours, None
        opacity = np.full(256, 255, np.uint8)  # of each colour: one is clear, or the file has a list of opacities
        opacity[slice(clear, clear + 1) if isinstance(clear, int) else slice(len(clear))] = 0 if isinstance(clear, int) else list(clear)
        return colours, opacity[stored]
    if image.mode == "CMYK":
        inks, light = stored[..., :3].astype(np.int64), 255 - stored[..., 3:].astype(np.int64)
        return (light - (2 * inks * light + 255) // 510).astype(np.uint8), None
    grey = stored.astype(np.int64)
    if image.mode.startswith("I"):
        grey = (2 * grey + 257) // 514
    elif image.mode == "1":
        grey = grey * 255
    else:
        assert image.mode == "L", image.mode
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1), None


def _padded(pixels: _Pixels, spec: PreprocessingSpec) -> _Pixels:
    """The image in the middle of a canvas whose longer side is `target_ratio` times its shorter: by the docstring of the spec."""
    height, width = pixels.shape[:2]
    if max(height, width) <= spec.target_ratio * min(height, width):
        return pixels
    wanted = max(height, width) / spec.target_ratio
    if spec.fit == "target_pad":  # to that size; an odd pixel goes to the end
        canvas = tuple(max(side, int(wanted)) for side in (height, width))
        start = tuple((whole - side) // 2 for whole, side in zip(canvas, (height, width), strict=True))
    else:  # by as much on both ends (CLIP4Cir)
        start = tuple(max(int((wanted - side) / 2), 0) for side in (height, width))
        canvas = (height + 2 * start[0], width + 2 * start[1])
    found = np.empty((*canvas, 3), np.uint8)
    found[:] = spec.background
    found[start[0] : start[0] + height, start[1] : start[1] + width] = pixels
    return found


def _cropped(pixels: _Pixels, spec: PreprocessingSpec) -> _Pixels:
    """Shorter side to `image_size`, then the middle square (torchvision's Resize and CenterCrop)."""
    height, width = pixels.shape[:2]
    shorter, side = min(height, width), spec.image_size
    if shorter != side:
        size = (int(side * width / shorter), int(side * height / shorter))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, _RESAMPLE[spec.resample]))
    top, left = (round((length - side) / 2) for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def token_ids(
    texts: Sequence[str], tokenizer: Path, *, pad_id: int, max_length: int, captions: str = "plain"
) -> Mapping[str, NDArray[np.int64]]:
    """`input_ids` and `attention_mask` (B, L) by transformers' fast tokenizer on the file `tokenizer`, of `captions` (`ModelConfig`)."""
    from transformers import PreTrainedTokenizerFast

    if captions == "blip":
        texts = [_blip_caption(text) for text in texts]

    fast: Any = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    fast.pad_token = fast.convert_ids_to_tokens(pad_id)
    fast.padding_side = fast.truncation_side = "right"
    found = fast(list(texts), padding="longest", truncation=True, max_length=max_length, return_tensors="np")
    return {name: np.asarray(found[name], np.int64) for name in ("input_ids", "attention_mask")}


def _blip_caption(text: str) -> str:
    """BLIP's caption processor, character by character: by the docstring of the runtime's."""
    found: list[str] = []
    for character in text.lower():
        blank = character in '.!"()*#:;~' or character.isspace()
        if blank and found and found[-1].isspace():
            found[-1] = " "
        else:
            found.append(" " if character in '.!"()*#:;~' else character)
    while found and found[-1] == "\n":
        found.pop()
    return " ".join("".join(found).strip(" ").split(" ")[:50])
