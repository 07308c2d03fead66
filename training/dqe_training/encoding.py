"""Encoding many images: tokens of what is frozen once, target tokens of a whole gallery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data.images import to_pixel_values
from .data.triplets import TextBatcher
from .distributed import World
from .model import DQEModel

Listener = Callable[[dict[str, Any]], None]

ENCODE_BATCH = 32
TOKEN_BATCH = 256
"""Rows through the Q-Former at a time, where no gradients are needed."""


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
    world: World | None = None,
) -> Tensor:
    """Image tokens (N, P, Hv) of `dtype` on the CPU, from resized (N, H, W, 3) uint8 pixels. Ranks of `world` share the work."""
    world = world or World()
    tokens = torch.empty(len(pixels), model.sizes.image_tokens, model.sizes.vision_width, dtype=dtype)
    mine = world.rows(len(pixels), ENCODE_BATCH)
    for start in mine[::ENCODE_BATCH]:
        stop = min(start + ENCODE_BATCH, mine.stop)
        tokens[start:stop] = encode_pixels(model, pixels[start:stop]).to(dtype).cpu()
        listener({"event": "encode", "done": stop - mine.start, "total": len(mine)})
    return world.complete(tokens, ENCODE_BATCH)


class TrainingImages:
    """Image tokens, and target tokens, of a training's images by row: through the model where it trains, else from tables, which
    `prepare` makes. `pixels` (I, H, W, 3) uint8 may be None where a `table` of image tokens is given. `frozen`: the vision tower
    is; `encoder_frozen`: all that targets go through is."""

    def __init__(
        self,
        model: DQEModel,
        pixels: NDArray[np.uint8] | None,
        table: TokenTable | None,
        *,
        frozen: bool,
        world: World,
        encoder_frozen: bool = False,
    ) -> None:
        self._model, self._pixels, self._table, self._world = model, pixels, table, world
        self._frozen, self._encoder_frozen = frozen, encoder_frozen
        self._targets: NDArray[np.float32] | None = None

    def prepare(self, listener: Listener) -> None:
        """Encode the images with what is frozen, once. Not before resuming, which may bring the encoder."""
        if self._frozen and self._table is None:
            assert self._pixels is not None
            self._table = encode_image_tokens(self._model, self._pixels, listener=listener, world=self._world)
        if self._encoder_frozen:
            self._targets = self._encode_targets()

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        """Tokens (B, P, Hv) float32 of the images at `rows` (B,), on the model's device."""
        device = self._model.query_tokens.device
        if self._frozen:
            assert self._table is not None
            return self._table[torch.from_numpy(rows)].to(device).float()
        assert self._pixels is not None
        return self._model.encode_images(to_pixel_values(self._pixels[rows], self._model.config.preprocessing).to(device))

    def targets(self, rows: NDArray[np.int64]) -> Tensor:
        """Target tokens (B, M, D) of the images at `rows` (B,), on the model's device."""
        if self._targets is None:
            return self._model.encode_targets(self(rows))
        return torch.from_numpy(self._targets[rows]).to(self._model.query_tokens.device)

    def all_targets(self) -> NDArray[np.float32]:
        """Target tokens (I, M, D) of all images, of the model as it is. The ranks of `world` share the work."""
        return self._encode_targets() if self._targets is None else self._targets

    def _encode_targets(self) -> NDArray[np.float32]:
        images = self._pixels if self._table is None else self._table
        assert images is not None
        sizes = self._model.sizes
        tokens = torch.empty(len(images), sizes.target_tokens, sizes.embedding_dim)
        mine = self._world.rows(len(images), TOKEN_BATCH)
        with evaluating(self._model):
            for start in mine[::TOKEN_BATCH]:
                stop = min(start + TOKEN_BATCH, mine.stop)
                tokens[start:stop] = self._model.encode_targets(self(np.arange(start, stop))).float().cpu()
        return self._world.complete(tokens, TOKEN_BATCH).numpy()


def encode_queries(
    model: DQEModel, images: TrainingImages, texts: TextBatcher, references: NDArray[np.int64], read: NDArray[np.int64], world: World
) -> Tensor:
    """Composed queries (B, D) float32 on the CPU, of `references` (B,) rows of the images and `read` (B,) rows of the texts.
    The ranks of `world` share the work."""
    device = model.query_tokens.device
    queries = torch.empty(len(read), model.sizes.embedding_dim)
    mine = world.rows(len(read), TOKEN_BATCH)
    with evaluating(model):
        for start in mine[::TOKEN_BATCH]:
            part = slice(start, min(start + TOKEN_BATCH, mine.stop))
            ids, mask = (t.to(device) for t in texts(torch.from_numpy(read[part])))
            queries[part] = model.encode_query(images(references[part]), ids, mask).query.float().cpu()
    return world.complete(queries, TOKEN_BATCH)
