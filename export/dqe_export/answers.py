"""The whole bundle in its answers: the runtime against PyTorch on an evaluation set, from image files and texts to rankings."""

from __future__ import annotations

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

_RESAMPLES = 2000


def check_retrieval(
    checkpoint: Checkpoint, bundle: Path, evaluation: EvaluationSet, images: Path, *, data: str, precision: Precision
) -> RetrievalParity:
    """Answer every query of `evaluation` in PyTorch (float32) and through the runtime, preprocessing and text included.

    Raises ParityError where recall@10 or the overlap of the first ten falls by more than the precision allows; one query may always
    change its mind.
    """
    model = checkpoint.model
    _, ours = evaluate_model(model, checkpoint.tokenizer, evaluation, encode_gallery_images(model, images, evaluation))
    engine = RetrievalEngine.load(bundle, provider="cpu", verify=False)
    index_gallery(engine, images, evaluation)
    _, theirs = evaluate_engine(engine, evaluation)
    hits = [(found.ranked[:, :10] == evaluation.target[:, None]).any(axis=1) for found in (ours, theirs)]
    change = 100 * (hits[1].astype(np.float64) - hits[0])
    rows = np.random.default_rng(0).integers(len(change), size=(_RESAMPLES, len(change)))
    low, high = np.quantile(change[rows].mean(axis=1), [0.025, 0.975])
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
    return RetrievalParity(
        data=data, queries=len(change), gallery=len(evaluation.gallery), pytorch_recall_at_10=float(hits[0].mean()),
        bundle_recall_at_10=float(hits[1].mean()), difference=float(change.mean()), interval=(float(low), float(high)),
        top10_overlap=float(overlap), allowed=allowed,
    )  # fmt: skip
