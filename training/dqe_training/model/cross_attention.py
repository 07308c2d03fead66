"""Cross-attention from a few queries to many image tokens, without making keys and values of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention


class FewQueryCrossAttention(Blip2QFormerMultiHeadAttention):
    """Upstream's cross-attention with the products taken in another order; the same parameters, the same result up to rounding.

    With d the width of a head, K_h its key matrix and x one of the P image tokens, of width Hv: a score q_h·(K_h x) is (K_hᵀ q_h)·x, and an
    output Σ p (V_h x) is V_h (Σ p x). So the Q queries are taken to the tokens' space and back, instead of the tokens to every
    head's (the absorbed projections of DeepSeek-V2, arXiv 2405.04434, section 2.1.2): 2·h·Q·Hv·(P + d) multiply-adds in place of
    2·h·d·P·(Hv + Q), and no copy of the tokens. The keys' bias moves all scores of a query alike, which softmax does not see.

    Queries of batch 1 attend to the tokens of every image.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Queries (B or 1, Q, H) and image tokens (B, P, Hv) to (B, Q, H), and the attention (B, h * Q, P). No mask of the tokens."""
        assert encoder_hidden_states is not None
        assert encoder_attention_mask is None
        if type(self.key) is not nn.Linear or type(self.value) is not nn.Linear:  # adapters: not one matrix each
            return super().forward(hidden_states, encoder_hidden_states=encoder_hidden_states)
        images, (batch, queries, _) = encoder_hidden_states, hidden_states.shape
        heads, width, image_width = self.num_attention_heads, self.attention_head_size, images.shape[-1]
        projected = (self.query(hidden_states) * self.scaling).view(batch * queries, heads, width).transpose(0, 1)
        asked = projected @ self.key.weight.view(heads, width, image_width)  # (h, B * Q, Hv)
        asked = asked.view(heads, batch, queries, image_width).transpose(0, 1).reshape(batch, heads * queries, image_width)
        attention = (asked @ images.transpose(1, 2)).softmax(dim=-1)  # (B, h * Q, P)
        attention = F.dropout(attention, self.attention_dropout, self.training)
        seen = (attention @ images).view(-1, heads, queries, image_width).transpose(0, 1).reshape(heads, -1, image_width)
        output = seen @ self.value.weight.view(heads, width, image_width).transpose(1, 2)  # (h, B * Q, d)
        bias = self.value.bias.view(heads, 1, width)
        if self.training and self.attention_dropout:  # what is left of a query's attention no longer sums to 1
            bias = attention.sum(dim=-1).view(-1, heads, queries).transpose(0, 1).reshape(heads, -1, 1) * bias
        output = (output + bias).transpose(0, 1).reshape(-1, queries, heads * width)
        return output, attention


@contextmanager
def upstream_attention(qformer: Blip2QFormerModel) -> Iterator[None]:
    """Upstream's own products inside: two plain matrices per layer, which 8-bit products do not mind."""
    ours = [module for module in qformer.modules() if type(module) is FewQueryCrossAttention]
    for module in ours:
        module.__class__ = Blip2QFormerMultiHeadAttention
    try:
        yield
    finally:
        for module in ours:
            module.__class__ = FewQueryCrossAttention


def use_few_query_attention(qformer: Blip2QFormerModel, queries: int, tokens: int) -> None:
    """Let the Q-Former's cross-attention from `queries` to `tokens` be `FewQueryCrossAttention` where that is fewer multiply-adds."""
    for layer in qformer.encoder.layer:
        if not layer.has_cross_attention:
            continue
        attention = layer.crossattention.attention
        width, image_width = attention.attention_head_size, attention.key.in_features
        if queries * image_width * (tokens + width) < width * tokens * (image_width + queries):
            attention.__class__ = FewQueryCrossAttention
