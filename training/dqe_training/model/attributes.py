"""Attention pools over the fused tokens, and on them the learnable attribute weights (LAW): a sub-query and a weight per attribute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import WeightInputs


class AttentionPool(nn.Module):
    """`count` learned seeds that each attend to the fused query and text tokens: P_a Σ_t α_at F_t (docs/method.md, equation 4)."""

    def __init__(self, hidden_size: int, embedding_dim: int, count: int) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(count, hidden_size) * hidden_size**-0.5)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.projection = nn.Parameter(torch.randn(count, hidden_size, embedding_dim) * hidden_size**-0.5)

    def pool(self, fused: Tensor, mask: Tensor) -> Tensor:
        """`fused` (B, T, H) query and text tokens, `mask` (B, T) 1 where valid -> (B, count, H)."""
        scores = torch.einsum("ah,bth->bat", self.seeds, self.key(fused))  # (B, count, T)
        scores = scores + (1.0 - mask[:, None, :].to(scores.dtype)) * -1e4
        return torch.einsum("bat,bth->bah", scores.softmax(dim=-1), fused)

    def project(self, pooled: Tensor) -> Tensor:
        """What `pool` gives, (B, count, H) -> (B, count, D) unit norm."""
        return F.normalize(torch.einsum("bah,ahd->bad", pooled, self.projection), dim=-1)

    def sub_queries(self, fused: Tensor, mask: Tensor) -> Tensor:
        """`fused` (B, T, H), `mask` (B, T) -> (B, count, D) unit norm."""
        return self.project(self.pool(fused, mask))


class AttributeHeads(AttentionPool):
    """Sub-queries s_a and weights w_a for A attributes (docs/method.md, equations 4 to 6).

    The weights are read off the word embeddings ("text"), or off these and what the attribute pooled from the fused tokens
    ("text+image"), which have seen the reference image. They track the text only with a presence loss on `logits` (losses/presence.py).
    "constant" ones read nothing: every logit is 0.
    """

    def __init__(self, hidden_size: int, embedding_dim: int, attributes: int) -> None:
        super().__init__(hidden_size, embedding_dim, attributes)
        self.word_norm = nn.LayerNorm(hidden_size)
        self.presence = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, attributes))
        self.gain = nn.Parameter(torch.zeros(attributes))
        self.weights_from: WeightInputs = "text"

    def let_weights_see(self) -> None:
        """Read the weights off the pooled fused tokens, too; draws what that takes."""
        hidden_size = self.seeds.shape[1]
        self.weights_from = "text+image"
        self.seen_norm = nn.LayerNorm(hidden_size)
        self.seen = nn.Linear(hidden_size, hidden_size, bias=False)

    def keep_weights_constant(self) -> None:
        """Drop what reads the text; it was drawn, so the other weights of the seed are those of heads that read it."""
        self.weights_from = "constant"
        del self.word_norm, self.presence

    def logits(self, word_embeddings: Tensor, attention_mask: Tensor, pooled: Tensor) -> Tensor:
        """Presence logits (B, A) from the words' embeddings (B, L, H), padding excluded, and `pooled` (B, A, H), which `pool` gave.

        With "text", `pooled` is not read. With "text+image", its share is added to the hidden layer, once per attribute. With "constant",
        nothing is read, and all are 0.
        """
        if self.weights_from == "constant":
            return pooled.new_zeros(pooled.shape[:2])
        weights = attention_mask.to(word_embeddings.dtype)[:, :, None]  # (B, L, 1)
        mean = (self.word_norm(word_embeddings) * weights).sum(1) / weights.sum(1).clamp_min(1.0)  # (B, H)
        if self.weights_from == "text":
            logits: Tensor = self.presence(mean)
            return logits
        first, activation, last = self.presence
        hidden = activation(first(mean)[:, None] + self.seen(self.seen_norm(pooled)))  # (B, A, H)
        return (hidden * last.weight).sum(-1) + last.bias

    def weights(self, logits: Tensor) -> Tensor:
        """w_a = softplus(gain_a) / softplus(0) * sigmoid(logit_a), so w_a >= 0 and at most the attribute's learned gain."""
        return F.softplus(self.gain) / F.softplus(torch.zeros_like(self.gain)) * torch.sigmoid(logits)


def compose(base_query: Tensor, sub_queries: Tensor, weights: Tensor) -> Tensor:
    """q = unit(q0 + sum_a w_a s_a): (B, D), (B, A, D), (B, A) -> (B, D). The runtime's twin is dqe_engine.compose."""
    return F.normalize(base_query + torch.einsum("ba,bad->bd", weights, sub_queries), dim=-1)
