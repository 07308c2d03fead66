"""Pairwise ranking of the target over one mid-zone negative (paper: margin ranking loss on the TRNS negative)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def ranking_loss(positive: Tensor, negative: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    """Mean over `valid` rows of -log sigmoid((s+ - s-) / temperature); all arguments (B,). Zero when none is valid."""
    losses = F.softplus((negative - positive) / temperature)
    return (losses * valid).sum() / valid.sum().clamp_min(1)
