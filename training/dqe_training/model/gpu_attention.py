"""Attention in the form that a GPU's compiler fuses: two products around a softmax, the queries scaled before the first. Same weights,
same results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention, Blip2QFormerMultiHeadAttention

from .cross_attention import FewQueryCrossAttention
from .dqe import DQEModel


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Queries (B or 1, h, Q, d) on keys and values (B, h, P, d) to (B, Q, h * d); `mask` (B, 1, 1, P) is added to the scores.

    A fused kernel takes queries, keys and values of one batch, and the scale before the first product (docs/tensorrt.md).
    """
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    scores = (query * scaling) @ key.transpose(-1, -2)  # (B, h, Q, P)
    if mask is not None:
        scores = scores + mask
    output = (scores.softmax(dim=-1) @ value).transpose(1, 2)  # (B, Q, h, d)
    return output.reshape(*output.shape[:2], output.shape[2] * output.shape[3])


class GpuQFormerAttention(Blip2QFormerMultiHeadAttention):
    """Self- or cross-attention of the Q-Former. The number of heads is a constant of the graph, which TensorRT asks for."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Queries (B or 1, Q, H) to (B, Q, H), attending to themselves or to image tokens (B, P, Hv), which have no mask."""
        tokens, mask = (hidden_states, attention_mask) if encoder_hidden_states is None else (encoder_hidden_states, encoder_attention_mask)
        inputs = ((self.query, hidden_states), (self.key, tokens), (self.value, tokens))
        heads = (self.num_attention_heads, self.attention_head_size)
        query, key, value = (layer(x).view(*x.shape[:2], *heads).transpose(1, 2) for layer, x in inputs)
        return attend(query, key, value, self.scaling, mask), None


class GpuVisionAttention(Blip2Attention):
    """Self-attention of the vision tower, whose queries, keys and values come from one product."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, P, Hv) to the same."""
        together = self.qkv(hidden_states).view(*hidden_states.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.projection(attend(together[0], together[1], together[2], self.scale)), None


_GPU_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    FewQueryCrossAttention: GpuQFormerAttention,
    Blip2QFormerMultiHeadAttention: GpuQFormerAttention,
    Blip2Attention: GpuVisionAttention,
}


@contextmanager
def gpu_attention(model: DQEModel) -> Iterator[None]:
    """Inside, all multi-head attention of `model` is in this form. It is slower than ours on a CPU, and has no dropout."""
    before = {module: type(module) for module in model.modules() if type(module) in _GPU_CLASSES}
    for module, kind in before.items():
        module.__class__ = _GPU_CLASSES[kind]
    try:
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind
