"""What rankings are worth: outcomes by query, their means, and paired intervals of differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones.arrays import I64
from dqe_training.evaluation.metrics import average_precision_at_k

F64 = NDArray[np.float64]

CUTS = (1, 5, 10, 50)
DEPTH = max(CUTS)
TOP = 10
"""How deep mAP and the overlap with exact search look."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Of Q queries. What several differ in is their rankings alone, so they are compared query by query."""

    rank: I64  # (Q,) of the labelled target, 1 the best; 0: not in the ranking
    overlap: F64  # (Q,) share of the exact top 10 that is in this top 10
    average_precision: F64 | None  # (Q,) AP@10 over all valid answers; None where the dataset does not say which are valid


def outcomes(ranked: I64, target: I64, exact: I64, relevant: Sequence[Sequence[int]] | None = None) -> Outcomes:
    """From rankings (Q, K) of gallery positions, padded with -1, and those of exact search (Q, >= 10)."""
    hits = ranked == target[:, None]
    rank = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
    wanted = [set(row[row >= 0].tolist()) for row in exact[:, :TOP]]
    overlap = np.array([len(w & set(row.tolist())) / len(w) for w, row in zip(wanted, ranked[:, :TOP], strict=True)], np.float64)
    precision = None
    if relevant is not None:
        precision = np.array([average_precision_at_k(row.tolist(), valid, TOP) for row, valid in zip(ranked, relevant, strict=True)])
    return Outcomes(rank.astype(np.int64), overlap, precision)


def by_query(found: Outcomes) -> dict[str, F64]:
    """The values (Q,) whose means are the figures."""
    out = {f"recall_at_{k}": ((found.rank > 0) & (found.rank <= k)).astype(np.float64) for k in CUTS}
    if found.average_precision is not None:
        out["map_at_10"] = found.average_precision
    return out | {"overlap_at_10": found.overlap}


def means(found: Outcomes) -> dict[str, float]:
    """All in [0, 1]."""
    return {name: float(values.mean()) for name, values in by_query(found).items()}


def record(found: Outcomes) -> dict[str, Any]:
    """For a result file: the means, and by query what they are made of (see `from_record`)."""
    values: dict[str, list[float]] = {"rank": found.rank.tolist(), "overlap": found.overlap.round(4).tolist()}
    if found.average_precision is not None:
        values["average_precision"] = found.average_precision.round(4).tolist()
    return {"figures": means(found), "per_query": values}


def from_record(values: Mapping[str, Sequence[float]]) -> Outcomes:
    """What `record` wrote as `per_query`."""
    precision = values.get("average_precision")
    return Outcomes(
        np.array(values["rank"], np.int64), np.array(values["overlap"], np.float64), None if precision is None else np.array(precision)
    )


def differences(ours: Outcomes, other: Outcomes) -> dict[str, tuple[float, float, float]]:
    """Per figure: ours - other, and the ends of its 95 % bootstrap interval over queries, the same queries drawn for both."""
    mine, theirs = by_query(ours), by_query(other)
    count = len(ours.rank)
    drawn = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    out = {}
    for name in (name for name in mine if name in theirs):
        gaps = mine[name] - theirs[name]
        low, high = np.quantile(gaps[drawn].mean(axis=1), (0.025, 0.975))
        out[name] = (float(gaps.mean()), float(low), float(high))
    return out
