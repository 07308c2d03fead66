"""Whether rankings are right: held against float64 scores of the queries as PyTorch encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..harness import Agreement
from .searchers import Ranking, TorchEncoder, TorchFiles, encode_by_torch
from .setting import KINDS, Setting, save_array, workload

ATOL = 2e-5
"""Of scores of unit vectors, between PyTorch and ONNX Runtime: twenty times what was seen of the demo's model."""


def write_truth(setting: Setting) -> None:
    """The true scores of the pool, of both kinds of reference. Imports torch: call in a process of its own."""
    work, encoder = workload(setting), TorchEncoder(TorchFiles.of(setting))
    targets = np.load(setting.targets_file).astype(np.float64)  # (N, M, D)
    for kind in KINDS:
        references, texts = work.batch(kind, 0, setting.pool)
        queries = encode_by_torch(encoder, references, texts).astype(np.float64)
        scores = np.stack([(targets @ query).max(axis=1) for query in queries])  # (Q, N)
        if kind == "catalogue":
            scores[np.arange(len(scores)), work.rows] = -np.inf
        save_array(setting.truth_file(kind), scores)


@dataclass(frozen=True, slots=True)
class Answer:
    """`exact`: whether the contender says that it computes every score, in float32."""

    rankings: Sequence[Ranking]
    exact: bool


def compare(answer: Answer, positions: dict[str, int], truth: NDArray[np.float64], k: int) -> Agreement:
    """Rankings of the queries of `truth` (Q, N), in its order.

    Exact ones have, rank by rank, a score within `ATOL` of the best there is: the same ids but where scores are equal within that.
    Others need only be k different candidates. `same_ids` is the share of the true k that were found, their recall.
    """
    k = min(k, int(np.isfinite(truth).sum(axis=1).min()))
    if len(answer.rankings) != len(truth):
        return Agreement(False, np.inf, 0.0, f"{len(answer.rankings)} rankings for {len(truth)} queries")
    errors, same = [], []
    for row, ranking in zip(truth, answer.rankings, strict=True):
        ats = [positions.get(id, -1) for id, _ in ranking]
        if len(ats) != k or len(set(ats)) != k or min(ats) < 0 or not np.isfinite(row[ats]).all():
            return Agreement(False, np.inf, 0.0, f"a ranking of {len(set(ats))} candidates, expected {k} and not the reference")
        best = np.argsort(-row, kind="stable")[:k]
        returned = np.array([score for _, score in ranking])
        errors.append(max(np.abs(row[ats] - row[best]).max(), np.abs(returned - row[ats]).max()))
        same.append(len(set(ats) & set(best.tolist())) / k)
    worst, share = float(max(errors)), float(np.mean(same))
    wrong = answer.exact and worst > ATOL
    return Agreement(not wrong, worst, share, f"scores off by {worst:.2g}, allowed are {ATOL:g}" if wrong else "")
