"""What a cached feature depends on: the bytes of an image, and the tower and preprocessing that it went through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, sha256_of
from dqe_engine.processors import available_cpus

from ..data.images import require_images
from ..model import DQEModel

_CHUNK = 256


def feature_key(model: DQEModel) -> str:
    """Identity of `model`'s vision tower and preprocessing, 32 hexadecimal digits.

    Weights count as rounded to float16: a tower has one key whether it is held in float32 or, as while it is frozen on a
    GPU, in float16.
    """
    digest = hashlib.sha256()
    v = model.config.vision
    shape = [v.hidden_size, v.layers, v.heads, v.mlp_width, v.patch_size, v.layer_norm_eps, v.activation, v.qkv_bias]
    if v.pre_norm or v.final_norm_eps:  # towers without keep the keys that they had before there were such
        shape += [v.pre_norm, v.final_norm_eps]
    digest.update(to_json((model.config.preprocessing, shape)))
    for name, value in sorted(model.vision_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()[:32]


def same_tower(model: DQEModel, weights: dict[str, Tensor]) -> bool:
    """Whether a model's saved `weights` have `model`'s vision tower, as `feature_key` tells towers apart."""
    half = torch.float16
    own = model.vision_model.state_dict()
    return all(torch.equal(weights[f"vision_model.{name}"].to(half), value.to("cpu", half)) for name, value in own.items())


def digest_images(directory: Path, names: Sequence[str], *, advance: Callable[[int], None] = lambda n: None) -> list[str]:
    """SHA-256 of each image file's bytes. Raises InputError, also for images that are missing (all are counted)."""
    require_images(directory, names)
    digests: list[str] = []
    with ThreadPoolExecutor(available_cpus()) as pool:
        for start in range(0, len(names), _CHUNK):
            try:
                digests += pool.map(sha256_of, [directory / name for name in names[start : start + _CHUNK]])
            except OSError as error:
                raise InputError(describe_os_error(error)) from error
            advance(min(_CHUNK, len(names) - start))
    return digests
