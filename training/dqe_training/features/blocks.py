"""Image tokens of any number of images, a block at a time: from a cache, or from the tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import load_pixels
from ..encoding import ENCODE_BATCH, Listener, encode_pixels
from ..model import DQEModel
from .writing import cached_tokens

_DECODED_AT_ONCE = 512  # images: enough for every decoding thread, 77 MB of pixels at 224


def image_token_blocks(
    model: DQEModel,
    images: Path,
    names: Sequence[str],
    *,
    features: Path | None = None,
    listener: Listener = lambda event: None,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[Tensor]:
    """Image tokens (B, P, Hv) of images in order, a block at a time, of any float dtype.

    From the cache `features`, where one is given, which is filled with what it lacks; `listener` hears what it has to say.
    """
    if features is not None:
        tokens = cached_tokens(features, model, images, names, listener=listener)
        for rows in torch.arange(len(names)).split(ENCODE_BATCH):
            yield tokens[rows]
            advance(len(rows))
        return
    for start in range(0, len(names), _DECODED_AT_ONCE):
        pixels = load_pixels(images, names[start : start + _DECODED_AT_ONCE], model.config.preprocessing)
        for first in range(0, len(pixels), ENCODE_BATCH):
            yield encode_pixels(model, pixels[first : first + ENCODE_BATCH])
            advance(min(ENCODE_BATCH, len(pixels) - first))
