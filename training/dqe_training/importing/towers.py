"""The vision towers that LAVIS's models have: EVA's ViT-g, and CLIP's ViT-L with its LayerNorm before the first block.

Each is a function of the tower's tensors, whose names begin with `prefix`, that describes it and says where they go. What no tensor
shows (attention heads, epsilons) is the published classes' own, by width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dqe_engine.errors import CheckpointError

from ..config.schema import VisionConfig
from .moves import Moves
from .reading import Stored, under

HEADS = {1408: 16, 1024: 16}
"""Attention heads of the published towers, by width: ViT-g and ViT-L."""
LAYERS = {1408: 39, 1024: 23}
"""Blocks that BLIP-2 runs. A file with the tower alone holds one more: LAVIS reads what the block before the last gives."""
_LAST = "the last block of a tower's own file: BLIP-2 reads what the one before gives"
_OWN_END = "the norm, pooling or head after the tower's last block, for its own training"


class Tower(NamedTuple):
    """What a tower's tensors describe. `image_size` in pixels."""

    config: VisionConfig
    image_size: int


def has_tower(prefix: str, tensors: Mapping[str, Stored]) -> bool:
    """Whether any of `tensors` belongs to a tower."""
    return any(True for _ in under(prefix, tensors))


def read_tower(prefix: str, tensors: Mapping[str, Stored], moves: Moves, *, heads: int | None, alone: bool, where: str) -> Tower:
    """Plan the tower at `prefix`. `heads` overrides `HEADS`; `alone`: it is in a file of its own. Raises CheckpointError."""
    if f"{prefix}patch_embed.proj.weight" in tensors:
        return _eva(prefix, tensors, moves, heads, alone, where)
    if f"{prefix}conv1.weight" in tensors:
        return _clip(prefix, tensors, moves, heads, alone, where)
    raise CheckpointError(
        f"{where}: no vision tower that is known here ({prefix}patch_embed.proj.weight of EVA's or {prefix}conv1.weight of CLIP's); "
        "published towers are EVA's ViT-g and CLIP's ViT-L"
    )


def heads_of(width: int, given: int | None, known: Mapping[int, int], option: str, where: str) -> int:
    """Attention heads, which no tensor shows. Raises CheckpointError where the width is no published one and none are given."""
    heads = given or known.get(width)
    if heads is None:
        raise CheckpointError(f"{where}: width {width} is none of the published {', '.join(map(str, known))}; say its heads with {option}")
    if width % heads:
        raise CheckpointError(f"{where}: width {width} is no multiple of {heads} heads; correct {option}")
    return heads


def shape_of(name: str, tensors: Mapping[str, Stored], dimensions: int, where: str) -> tuple[int, ...]:
    """The shape of a tensor that a size is read off. Raises CheckpointError."""
    if name not in tensors:
        raise CheckpointError(f"{where}: {name} is missing; copy the whole file")
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{where}: {name} has shape {shape}, expected {dimensions} dimensions, none of them 0")
    return shape


def count_layers(prefix: str, tensors: Mapping[str, Stored], where: str) -> int:
    """The layers `prefix`0, `prefix`1, … that there are. Raises CheckpointError for a gap."""
    found = {part for name in under(prefix, tensors) if (part := name[len(prefix) :].split(".")[0]).isdigit()}
    if found != {str(n) for n in range(len(found))} or not found:
        raise CheckpointError(f"{where}: the layers {prefix}N are not 0, 1, 2 and so on; copy the whole file")
    return len(found)


def _size(tokens: int, patch: int, name: str, where: str) -> int:
    side = math.isqrt(tokens - 1)
    if side < 1 or side * side != tokens - 1:
        raise CheckpointError(f"{where}: {name} has {tokens} positions, expected one more than a square of patches")
    return side * patch


def _used_layers(blocks: str, tensors: Mapping[str, Stored], moves: Moves, width: int, alone: bool, where: str) -> int:
    layers = count_layers(blocks, tensors, where)
    used = min(layers, LAYERS.get(width, layers)) if alone else layers
    moves.leave(tensors, {f"{blocks}{layer}.": _LAST for layer in range(used, layers)})
    return used


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Biases of query and value with the key's, which is zero, between them."""
    return torch.cat([parts[0], torch.zeros_like(parts[1]), parts[1]])


def _eva(prefix: str, tensors: Mapping[str, Stored], moves: Moves, heads: int | None, alone: bool, where: str) -> Tower:
    width, _, patch, _ = shape_of(f"{prefix}patch_embed.proj.weight", tensors, 4, where)
    tokens = shape_of(f"{prefix}pos_embed", tensors, 3, where)[1]
    layers = _used_layers(f"{prefix}blocks.", tensors, moves, width, alone, where)
    ours = "vision_model."
    moves.add(f"{ours}embeddings.class_embedding", f"{prefix}cls_token")
    moves.add(f"{ours}embeddings.position_embedding", f"{prefix}pos_embed")
    for kind in ("weight", "bias"):
        moves.add(f"{ours}embeddings.patch_embedding.{kind}", f"{prefix}patch_embed.proj.{kind}")
    for layer in range(layers):
        here, there = f"{ours}encoder.layers.{layer}.", f"{prefix}blocks.{layer}."
        moves.add(f"{here}self_attn.qkv.weight", f"{there}attn.qkv.weight")
        moves.add(f"{here}self_attn.qkv.bias", f"{there}attn.q_bias", f"{there}attn.v_bias", make=_joined)
        for name, theirs in _EVA_BLOCK.items():
            for kind in ("weight", "bias"):
                moves.add(f"{here}{name}.{kind}", f"{there}{theirs}.{kind}")
    if alone:
        moves.leave(tensors, {f"{prefix}{name}": _OWN_END for name in ("norm.", "fc_norm.", "head.", "mask_token")})
    mlp = shape_of(f"{prefix}blocks.0.mlp.fc1.weight", tensors, 2, where)[0]
    config = VisionConfig(
        hidden_size=width, layers=layers, heads=heads_of(width, heads, HEADS, "--vision-heads", where), mlp_size=mlp, patch_size=patch,
        layer_norm_eps=1e-6, final_norm_eps=1e-5,
    )  # fmt: skip
    return Tower(config, _size(tokens, patch, f"{prefix}pos_embed", where))


_EVA_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_CLIP_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.projection": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def _clip(prefix: str, tensors: Mapping[str, Stored], moves: Moves, heads: int | None, alone: bool, where: str) -> Tower:
    width, _, patch, _ = shape_of(f"{prefix}conv1.weight", tensors, 4, where)
    tokens = shape_of(f"{prefix}positional_embedding", tensors, 2, where)[0]
    layers = _used_layers(f"{prefix}transformer.resblocks.", tensors, moves, width, alone, where)
    ours = "vision_model."
    moves.add(f"{ours}embeddings.class_embedding", f"{prefix}class_embedding", make=lambda parts: parts[0][None, None])
    moves.add(f"{ours}embeddings.position_embedding", f"{prefix}positional_embedding", make=lambda parts: parts[0][None])
    moves.add(f"{ours}embeddings.patch_embedding.weight", f"{prefix}conv1.weight")
    moves.add(f"{ours}embeddings.patch_embedding.bias")
    for kind in ("weight", "bias"):
        moves.add(f"{ours}embeddings.pre_layernorm.{kind}", f"{prefix}ln_pre.{kind}")
    for layer in range(layers):
        here, there = f"{ours}encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            moves.add(f"{here}self_attn.qkv.{kind}", f"{there}attn.in_proj_{kind}")
            for name, theirs in _CLIP_BLOCK.items():
                moves.add(f"{here}{name}.{kind}", f"{there}{theirs}.{kind}")
    if alone:
        moves.leave(tensors, {f"{prefix}{name}": _OWN_END for name in ("ln_post.", "proj")})
    mlp = shape_of(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", tensors, 2, where)[0]
    config = VisionConfig(
        hidden_size=width, layers=layers, heads=heads_of(width, heads, HEADS, "--vision-heads", where), mlp_size=mlp, patch_size=patch,
        layer_norm_eps=1e-5, activation="quick_gelu", pre_norm=True,
    )  # fmt: skip
    return Tower(config, _size(tokens, patch, f"{prefix}positional_embedding", where))
