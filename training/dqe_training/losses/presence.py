"""Presence supervision of the attribute weights: does the text name the attribute? (our choice; docs/method.md)"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def presence_loss(logits: Tensor, named: Tensor) -> Tensor:
    """Binary cross-entropy of the weights' logits (B, A) against `named` (B, A) bool, mean over all entries."""
    return F.binary_cross_entropy_with_logits(logits, named.to(logits.dtype))
