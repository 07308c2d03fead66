"""Identity of everything but the attribute heads: heads belong to a bundle whose encoder has the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..backbone.weights import HEADS
from ..model import DQEModel
from ..model.adapters import plain_state
from .checkpoint import Checkpoint
from .meta import WEIGHTS


def encoder_hash(source: Path | Checkpoint | DQEModel) -> str:
    """SHA-256, 64 hexadecimal digits, of all weights but `attribute_heads.*`: of a checkpoint's directory, or of a model.

    By name in ascending order: name and shape as `name [d0, d1]` and a line feed, then the values as little-endian float32,
    row-major. Values stored in half precision count as the float32 numbers that they are, so the precision that a tower is
    stored or held in does not matter where no value was rounded. Adapters count as merged. One tensor at a time is copied.
    Names and values alone: equal hashes do not say that preprocessing, tokenizer or number of attention heads agree.
    The files of a directory are not verified here (`read_meta` does).
    """
    digest = hashlib.sha256()
    for name, value in _stored(source) if isinstance(source, Path) else _held(source):
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(directory / WEIGHTS, framework="pt") as stream:
        for name in _of_the_encoder(stream.keys()):
            yield name, stream.get_tensor(name)


def _held(source: Checkpoint | DQEModel) -> Iterator[tuple[str, Tensor]]:
    state = plain_state(source.model if isinstance(source, Checkpoint) else source)
    for name in _of_the_encoder(state):
        yield name, state[name].detach()


def _of_the_encoder(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith(HEADS))
