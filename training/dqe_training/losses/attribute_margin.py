"""Attribute-aware margin: a named attribute's sub-query must prefer its target to targets that differ in that attribute."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attribute_margin_loss(sub_scores: Tensor, labels: Tensor, named: Tensor, *, margin: float) -> Tensor:
    """max(0, margin - s(s_a, t_i) + max_j s(s_a, t_j)) over in-batch targets j whose label for a differs from i's.

    Args:
        sub_scores: (B, A, B), sub-query a of row i against target j.
        labels: (B, A) int64, value of attribute a shown by target i; -1 unknown (never compared).
        named: (B, A) bool, whether text i names attribute a.
        margin: in score units (cosine).

    Returns:
        Mean over the (i, a) that are named, labelled and have at least one differing target; zero when there is none.
    """
    by_attribute = labels.T  # (A, B)
    differs = (by_attribute[:, :, None] != by_attribute[:, None, :]) & (by_attribute >= 0)[:, :, None] & (by_attribute >= 0)[:, None, :]
    differs = differs.permute(1, 0, 2)  # (B, A, B)
    positive = sub_scores.diagonal(dim1=0, dim2=2).T  # (B, A)
    hardest = sub_scores.masked_fill(~differs, -2.0).amax(dim=2)  # (B, A); cosines are never below -1
    counted = named & differs.any(dim=2)
    losses = F.relu(margin - positive + hardest)
    return (losses * counted).sum() / counted.sum().clamp_min(1)
