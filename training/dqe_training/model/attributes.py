"""Learnable attribute weights (LAW): one sub-query per attribute from the fused tokens, one weight from the text alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AttributeHeads(nn.Module):
    """Sub-queries s_a and weights w_a for A attributes (docs/method.md, equations 4 to 6).

    The weights see only the word embeddings, so explaining or overriding them costs no image pass; a presence loss on
    `logits` is what makes them track the text (losses/presence.py).
    """

    def __init__(self, hidden_size: int, embedding_dim: int, attributes: int) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(attributes, hidden_size) * hidden_size**-0.5)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.projection = nn.Parameter(torch.randn(attributes, hidden_size, embedding_dim) * hidden_size**-0.5)
        self.word_norm = nn.LayerNorm(hidden_size)
        self.presence = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, attributes))
        self.gain = nn.Parameter(torch.zeros(attributes))

    def sub_queries(self, fused: Tensor, mask: Tensor) -> Tensor:
        """`fused` (B, T, H) query and text tokens, `mask` (B, T) 1 where valid -> (B, A, D) unit norm."""
        scores = torch.einsum("ah,bth->bat", self.seeds, self.key(fused))  # (B, A, T)
        scores = scores + (1.0 - mask[:, None, :].to(scores.dtype)) * -1e4
        pooled = torch.einsum("bat,bth->bah", scores.softmax(dim=-1), fused)  # (B, A, H)
        return F.normalize(torch.einsum("bah,ahd->bad", pooled, self.projection), dim=-1)

    def logits(self, word_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Presence logits (B, A) from the words' embeddings (B, L, H), padding excluded."""
        weights = attention_mask.to(word_embeddings.dtype)[:, :, None]  # (B, L, 1)
        mean = (self.word_norm(word_embeddings) * weights).sum(1) / weights.sum(1).clamp_min(1.0)  # (B, H)
        return self.presence(mean)

    def weights(self, logits: Tensor) -> Tensor:
        """w_a = softplus(gain_a) / softplus(0) * sigmoid(logit_a), so w_a >= 0 and at most the attribute's learned gain."""
        return F.softplus(self.gain) / F.softplus(torch.zeros_like(self.gain)) * torch.sigmoid(logits)


def compose(base_query: Tensor, sub_queries: Tensor, weights: Tensor) -> Tensor:
    """q = unit(q0 + sum_a w_a s_a): (B, D), (B, A, D), (B, A) -> (B, D). The runtime's twin is dqe_engine.compose."""
    return F.normalize(base_query + torch.einsum("ba,bad->bd", weights, sub_queries), dim=-1)
