"""The whole bundle in its answers: the runtime against PyTorch on an evaluation set, from image files and texts to rankings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from dqe_engine.contracts.manifest import Precision, RetrievalParity
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import ParityError
from dqe_training.checkpointing.checkpoint import Checkpoint
from dqe_training.evaluation.protocol import EvaluationSet
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.runtime import evaluate_engine, index_gallery

from .differences import TOLERANCES

_Z = 1.959964  # two-sided 95 % of the normal distribution


def check_retrieval(
    checkpoint: Checkpoint, bundle: Path, evaluation: EvaluationSet, images: Path, *, data: str, precision: Precision, shown: bool = False
) -> RetrievalParity:
    """Answer every query of `evaluation` in PyTorch (float32) and through the runtime, preprocessing and text included.

    Raises ParityError where recall@10 or the overlap of the first ten falls by more than the precision allows; one query may always
    change its mind. That finds faults, but few queries show little: of 100, a true loss of 2 points passes four times in ten where 1 is
    allowed. With `shown`, the lower end of the 95 % interval must lie within the precision's tolerance, too.
    """
    model = checkpoint.model
    _, ours = evaluate_model(model, checkpoint.tokenizer, evaluation, encode_gallery_images(model, images, evaluation))
    engine = RetrievalEngine.load(bundle, provider="cpu", verify=False)
    index_gallery(engine, images, evaluation)
    _, theirs = evaluate_engine(engine, evaluation)
    hits = [(found.ranked[:, :10] == evaluation.target[:, None]).any(axis=1) for found in (ours, theirs)]
    change = 100 * (hits[1].astype(np.float64) - hits[0])
    low, high = change_interval(lost=int((change < 0).sum()), gained=int((change > 0).sum()), queries=len(change))
    overlap = np.mean([np.isin(a[a >= 0], b).mean() for a, b in zip(ours.ranked[:, :10], theirs.ranked[:, :10], strict=True)])
    tolerance = TOLERANCES[precision]
    allowed = max(tolerance.recall_points, 100 / len(change))
    if not change.mean() >= -allowed:
        raise ParityError(
            f"recall@10 on {data} is {100 * hits[1].mean():.1f} % with the bundle, {100 * hits[0].mean():.1f} % in PyTorch: "
            f"more than {allowed:.1f} points lower; nothing was written; try a higher --precision"
        )
    if not overlap >= tolerance.min_overlap:
        raise ParityError(
            f"the bundle's first ten answers on {data} hold {100 * overlap:.1f} % of PyTorch's first ten, "
            f"less than {100 * tolerance.min_overlap:.1f} %; nothing was written; try a higher --precision"
        )
    if shown:
        require_shown(
            lost=int((change < 0).sum()), gained=int((change > 0).sum()), queries=len(change), allowed=tolerance.recall_points, data=data
        )
    return RetrievalParity(
        data=data, queries=len(change), gallery=len(evaluation.gallery), pytorch_recall_at_10=float(hits[0].mean()),
        bundle_recall_at_10=float(hits[1].mean()), difference=float(change.mean()), interval=(low, high),
        top10_overlap=float(overlap), allowed=allowed,
    )  # fmt: skip


def change_interval(*, lost: float, gained: float, queries: float) -> tuple[float, float]:
    """95 % interval of a change of recall, in points, of which `lost` queries found their target before and `gained` do now.

    Agresti and Min's for matched pairs (Statistics in Medicine 24, 2005): Wald's with half a query added to each of the four cells. It
    has a width also where no query changed, which a bootstrap of the same queries has not.
    """
    count, less, more = queries + 2, lost + 0.5, gained + 0.5
    middle = (more - less) / count
    half = _Z * math.sqrt(less + more - (more - less) ** 2 / count) / count
    return 100 * max(middle - half, -1.0), 100 * min(middle + half, 1.0)


def require_shown(*, lost: int, gained: int, queries: int, allowed: float, data: str) -> None:
    """Raises ParityError where these queries do not show that recall@10 falls by at most `allowed` points."""
    low, high = change_interval(lost=lost, gained=gained, queries=queries)
    if low >= -allowed:
        return
    change = 100 * (gained - lost) / queries
    room = allowed + change
    remedy = f"it takes some {math.ceil(queries * ((change - low) / room) ** 2):,} queries or fewer" if room > 0 else "more would not"
    raise ParityError(
        f"recall@10 on {data} changes by {change:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}), so these {queries:,} queries do "
        f"not show that it falls by at most {allowed:.1f}; {remedy} if others change as these do; nothing was written"
    )
