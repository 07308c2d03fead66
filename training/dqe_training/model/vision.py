"""The vision tower: transformers' `Blip2VisionModel`, sized by configuration, with an initialisation that learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionEmbeddings

from ..config import ModelConfig


class NormedEmbeddings(Blip2VisionEmbeddings):
    """Upstream's embeddings with CLIP's LayerNorm after them: what the first block reads. (B, 3, H, W) to (B, P, Hv)."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        return self.pre_layernorm(super().forward(pixel_values, interpolate_pos_encoding))


def build_vision(config: ModelConfig) -> Blip2VisionModel:
    """A randomly initialised tower. `pixel_values` (B, 3, H, W) -> `last_hidden_state` (B, P, Hv), P = 1 + patches.

    Under `torch.device("meta")` it has no memory and no values: for one that a checkpoint is loaded into.
    """
    v = config.vision
    tower = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=v.hidden_size,
            intermediate_size=v.mlp_width,
            num_hidden_layers=v.layers,
            num_attention_heads=v.heads,
            image_size=config.preprocessing.image_size,
            patch_size=v.patch_size,
            hidden_act=v.activation,
            layer_norm_eps=v.layer_norm_eps,
            qkv_bias=v.qkv_bias,
            initializer_range=0.02,  # upstream's default of 1e-10 suits only checkpoints that are loaded over it
            attn_implementation="sdpa",
        )
    )
    if v.pre_norm:
        tower.embeddings = NormedEmbeddings(tower.config)
        for parameter in (tower.embeddings.patch_embedding.weight, tower.embeddings.position_embedding):
            nn.init.normal_(parameter, std=0.02)
    if v.final_norm_eps:
        tower.post_layernorm.eps = v.final_norm_eps
    side = config.preprocessing.image_size // v.patch_size
    with torch.no_grad():
        # Random position embeddings drown in the patch embeddings; a 2-D sine/cosine start doubles how fast shape is learned.
        tower.embeddings.position_embedding[0, 1:] = 0.5 * sincos_2d(side, v.hidden_size)
        tower.embeddings.class_embedding.normal_(std=0.02)
    return tower


@contextmanager
def eager_attention(tower: Blip2VisionModel) -> Iterator[None]:
    """Attention as two plain products and a softmax inside: what exports best. Training is faster with `scaled_dot_product_attention`."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


def sincos_2d(side: int, width: int) -> Tensor:
    """(side * side, width) sine/cosine position embeddings: a quarter of the width each for sin/cos of x and y."""
    quarter = width // 4
    frequencies = torch.exp(-math.log(1e3) * torch.arange(quarter) / quarter)
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (xs, ys)]  # (side * side, quarter)
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return nn.functional.pad(table, (0, width - table.shape[1]))
