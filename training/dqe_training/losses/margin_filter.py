"""False negatives by score: in-batch targets that a query likes about as much as its own are no negatives (GISTEmbed, arXiv 2402.16829)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MarginStrategy = Literal["absolute", "relative"]


def suspected_positives(guide: Tensor, *, strategy: MarginStrategy, margin: float) -> Tensor:
    """(B, B) bool: entries j ≠ i that are left out of row i, since `guide`[i, j] is above the row's threshold.

    The threshold is s - margin ("absolute") or s · (1 - margin) ("relative"), where s = `guide`[i, i]; what equals it stays a negative.
    The names, the formulas and the default margin, 0, are those of sentence-transformers' `CachedGISTEmbedLoss`, of which this is the part
    that compares queries with targets; its terms between two queries and between two targets are no part of a retrieval's scores. Of a
    negative s, a relative margin raises the threshold, there as here.

    Args:
        guide: (B, B), scores of the queries against the batch's targets by the model that judges; column j is row j's target. No gradient
            flows. When the model that trains is its own guide, a margin of 0 or more leaves out every target that it ranks above the right
            one, thus each mistake that it makes in the batch.
        margin: at least 0, in score units, or as a share of s.
    """
    scores = guide.detach()
    own = scores.diagonal()[:, None]  # (B, 1)
    threshold = own - margin if strategy == "absolute" else own * (1 - margin)
    return (scores > threshold) & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
