"""KL relevance loss: related targets share probability mass instead of being pushed away (paper: KL-divergence loss)."""

from __future__ import annotations

import torch
from torch import Tensor


def relevance_distribution(target_similarity: Tensor, *, share: float, temperature: float, ignore: Tensor) -> Tensor:
    """P (B, B): `1 - share` on the ground truth, `share` spread over softmax(target-target similarity / temperature).

    `target_similarity` (B, B) gets no gradient. `ignore` (B, B) marks entries that are dropped (other rows with the
    same target image). The ground truth keeps the largest mass for any `share` < 0.5, whatever the similarities.
    """
    similarity = target_similarity.detach().masked_fill(ignore, float("-inf"))
    spread = (similarity / temperature).softmax(dim=1)
    return share * spread + (1 - share) * torch.eye(len(spread), device=spread.device, dtype=spread.dtype)


def kl_relevance_loss(scores: Tensor, relevance: Tensor, *, temperature: float, ignore: Tensor) -> Tensor:
    """Mean over the batch of KL(P || softmax(scores / temperature)); `scores` (B, B), column j is row j's target."""
    log_q = (scores / temperature).masked_fill(ignore, float("-inf")).log_softmax(dim=1)
    terms = torch.where(relevance > 0, relevance * (relevance.clamp_min(1e-12).log() - log_q), 0.0)
    return terms.sum(dim=1).mean()


def same_target(target_ids: Tensor) -> Tensor:
    """(B, B) mask of in-batch entries that share the row's target image, the diagonal excepted."""
    same = target_ids[:, None] == target_ids[None, :]
    return same & ~torch.eye(len(target_ids), dtype=torch.bool, device=target_ids.device)
