"""Encoding many images: tokens of a frozen tower once, target tokens of a whole gallery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data.images import to_pixel_values
from .model import DQEModel

Listener = Callable[[dict[str, Any]], None]

ENCODE_BATCH = 32


class TokenTable(Protocol):
    """Image tokens (N, P, Hv) by rows: a tensor, or `features.StoredTokens`, which reads from a cache what is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Tokens (B, P, Hv) of the images at `rows` (B,), on the CPU, of any float dtype."""
        ...


@contextmanager
def evaluating(model: DQEModel) -> Iterator[None]:
    """Evaluation mode and no gradients inside, the previous mode after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: tokens made here are trained on later
            yield
    finally:
        model.train(training)


def encode_pixels(model: DQEModel, pixels: NDArray[np.uint8]) -> Tensor:
    """Image tokens (B, P, Hv) float32 of resized (B, H, W, 3) uint8 pixels, B up to ENCODE_BATCH, on the model's device.

    The tower always sees ENCODE_BATCH images: matrix products of another size may add up in another order, and what an
    image's tokens are must not depend on which images it was encoded with (a feature cache is filled in any order).
    """
    values = to_pixel_values(pixels, model.config.preprocessing)
    padded = torch.cat([values, values[:1].expand(ENCODE_BATCH - len(values), -1, -1, -1)])
    device = model.query_tokens.device
    with evaluating(model), torch.autocast(device.type, enabled=False):  # the first step of a training asks from within its autocast
        return model.encode_images(padded.to(device))[: len(values)]


def encode_image_tokens(
    model: DQEModel,
    pixels: NDArray[np.uint8],
    *,
    dtype: torch.dtype = torch.float16,
    listener: Listener = lambda event: None,
) -> Tensor:
    """Image tokens (N, P, Hv) of `dtype` on the CPU, from resized (N, H, W, 3) uint8 pixels."""
    tokens = torch.empty(len(pixels), model.sizes.image_tokens, model.sizes.vision_width, dtype=dtype)
    for start in range(0, len(pixels), ENCODE_BATCH):
        stop = min(start + ENCODE_BATCH, len(pixels))
        tokens[start:stop] = encode_pixels(model, pixels[start:stop]).to(dtype).cpu()
        listener({"event": "encode", "done": stop, "total": len(pixels)})
    return tokens


def encode_target_tokens(model: DQEModel, image_tokens: Callable[[NDArray[np.int64]], Tensor], count: int) -> NDArray[np.float32]:
    """Target tokens (count, M, D) float32 of images 0 to count, whose image tokens `image_tokens(rows)` gives."""
    with evaluating(model):
        parts = [model.encode_targets(image_tokens(rows)).float().cpu() for rows in np.array_split(np.arange(count), -(-count // 256))]
        return torch.cat(parts).numpy()
