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

ENCODE_BATCH = 128


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


def encode_image_tokens(
    model: DQEModel,
    pixels: NDArray[np.uint8],
    *,
    dtype: torch.dtype = torch.float16,
    batch_size: int = ENCODE_BATCH,
    listener: Listener = lambda event: None,
) -> Tensor:
    """Image tokens (N, P, Hv) of `dtype` on the CPU, from resized (N, H, W, 3) uint8 pixels."""
    device, sizes = model.query_tokens.device, model.sizes
    tokens = torch.empty(len(pixels), sizes.image_tokens, sizes.vision_width, dtype=dtype)
    with evaluating(model):
        for start in range(0, len(pixels), batch_size):
            values = to_pixel_values(pixels[start : start + batch_size], model.config.preprocessing).to(device)
            tokens[start : start + len(values)] = model.encode_images(values).to(dtype).cpu()
            listener({"event": "encode", "done": start + len(values), "total": len(pixels)})
    return tokens


def encode_target_tokens(model: DQEModel, image_tokens: Callable[[NDArray[np.int64]], Tensor], count: int) -> NDArray[np.float32]:
    """Target tokens (count, M, D) float32 of images 0 to count, whose image tokens `image_tokens(rows)` gives."""
    with evaluating(model):
        parts = [model.encode_targets(image_tokens(rows)).float().cpu() for rows in np.array_split(np.arange(count), -(-count // 256))]
        return torch.cat(parts).numpy()
