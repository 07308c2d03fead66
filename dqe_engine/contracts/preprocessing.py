"""How an image becomes `pixel_values`: one spec that training, export and the runtime share."""

from __future__ import annotations

from typing import Literal

from .parsing import Contract

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PreprocessingSpec(Contract, frozen=True):
    """Decode (EXIF orientation applied, alpha composited onto `background`, converted to RGB), fit, resize, normalise.

    `fit`: "stretch" resizes to the square whatever the aspect ratio (BLIP-2's own processor); "target_pad" first pads
    the shorter side with `background` until longer / shorter <= `target_ratio`; "target_pad_crop" pads likewise, then
    resizes the shorter side to `image_size` and crops the centre: CLIP4Cir's transform, which QuRe takes over,
    with a black `background`.
    `mean` and `std` are per RGB channel, for values in [0, 1].
    `max_pixels` decides nothing and is kept so that bundles and configurations that name it can be read: a model says what it makes of
    an image, and the process that loads it says which images it takes (`ImagePolicy`).
    For the same reason the first step is bounded by the process, not by the spec: images of more than `EXACT_PIXELS`
    (dqe_engine/preprocessing.py) are shrunk before it.
    """

    image_size: int
    fit: Literal["stretch", "target_pad", "target_pad_crop"] = "stretch"
    target_ratio: float = 1.25
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    max_pixels: int = 80_000_000

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if self.target_ratio < 1:
            raise ValueError(f"target_ratio must be at least 1, got {self.target_ratio}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
