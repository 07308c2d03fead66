"""KL relevance loss: related targets share probability mass instead of being pushed away (paper: KL-divergence loss)."""

from __future__ import annotations

import torch
from torch import Tensor


def relevance_distribution(target_similarity: Tensor, *, share: float, temperature: float, ignore: Tensor) -> Tensor:
    """P (B, B): `1 - share` on the ground truth, `share` spread over softmax_{j != i}(target-target similarity / temperature).

    The ground truth has no part in the softmax: its similarity to itself, 1, would take nearly all of a sharp one, and the share
    would fall back to it. A row without any other entry keeps everything.

    Args:
        target_similarity: (B, B), gets no gradient.
        share: in [0, 0.5), so that the ground truth keeps the largest mass whatever the similarities.
        temperature: of the softmax, in score units (cosine).
        ignore: (B, B) bool, entries that are dropped (other rows with the same target image).
    """
    own = torch.eye(len(target_similarity), dtype=torch.bool, device=target_similarity.device)
    dropped = ignore | own
    spread = (target_similarity.detach() / temperature).masked_fill(dropped, float("-inf"))
    alone = dropped.all(dim=1, keepdim=True)  # (B, 1)
    shared = share * spread.masked_fill(alone, 0.0).softmax(dim=1).masked_fill(alone, 0.0)
    return shared + torch.diag_embed(1.0 - shared.sum(dim=1))


def relevance_figures(relevance: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
    """What P (B, B) does, each a mean over the rows: `truth`, the mass of the ground truth; `entropy` of P, in nats; and, where `valid`
    (B, B) bool marks the targets that answer row i, `valid`, their share of the mass beside the ground truth (0 / 0 counts as 0)."""
    own = torch.eye(len(relevance), dtype=torch.bool, device=relevance.device)
    figures = {"truth": relevance.diagonal().mean(), "entropy": -torch.xlogy(relevance, relevance).sum(dim=1).mean()}
    if valid is not None:
        beside = relevance.masked_fill(own, 0.0)
        figures["valid"] = ((beside * valid).sum(dim=1) / beside.sum(dim=1).clamp_min(1e-12)).mean()
    return figures


def kl_relevance_loss(scores: Tensor, relevance: Tensor, *, temperature: float | Tensor, ignore: Tensor) -> Tensor:
    """Mean over the batch of KL(P || softmax(scores / temperature)); `scores` (B, B), column j is row j's target."""
    log_q = (scores / temperature).masked_fill(ignore, float("-inf")).log_softmax(dim=1)
    terms = torch.where(relevance > 0, relevance * (relevance.clamp_min(1e-12).log() - log_q), 0.0)
    return terms.sum(dim=1).mean()


def same_target(target_ids: Tensor) -> Tensor:
    """(B, B) mask of in-batch entries that share the row's target image, the diagonal excepted."""
    same = target_ids[:, None] == target_ids[None, :]
    return same & ~torch.eye(len(target_ids), dtype=torch.bool, device=target_ids.device)
