"""Pairwise ranking of the target over one mid-zone negative (paper: margin ranking loss on the TRNS negative)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def ranking_loss(positive: Tensor, negative: Tensor, valid: Tensor, *, temperature: float | Tensor) -> Tensor:
    """The logistic form: mean over `valid` rows of -log sigmoid((s+ - s-) / temperature); all arguments (B,). Zero when none is valid."""
    losses = F.softplus((negative - positive) / temperature)
    return (losses * valid).sum() / valid.sum().clamp_min(1)


def margin_ranking_loss(positive: Tensor, negative: Tensor, valid: Tensor, *, margin: float) -> Tensor:
    """The margin form: mean over `valid` rows of max(0, margin - s+ + s-), in score units. Zero when none is valid."""
    losses = F.relu(margin - positive + negative)
    return (losses * valid).sum() / valid.sum().clamp_min(1)
