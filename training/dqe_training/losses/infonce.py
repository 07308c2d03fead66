"""InfoNCE: the contrastive objective that the paper starts from; here the baseline."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def infonce_loss(scores: Tensor, *, temperature: float | Tensor, ignore: Tensor) -> Tensor:
    """Cross-entropy of the ground truth among the batch's targets: `scores` (B, B), column j is row j's target.

    `ignore` (B, B) marks entries that are dropped, as in the KL loss.
    """
    logits = (scores / temperature).masked_fill(ignore, float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(scores), device=scores.device))
