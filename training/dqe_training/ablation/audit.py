"""What training did to its own queries: how valid images that are not labelled fare, and what the mid zone holds when it ends."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.zones.mining import MinedNegatives, mine_negatives
from dqe_engine.zones.reference import max_sim

from ..data.answers import Answers
from ..evaluation.failures import relevance_suppression, score_rows
from ..evaluation.metrics import PerQuery
from ..run.trainer import Trainer
from .scores import Scores

QUERIES = 500
PICKS = 16
_SEED = 20  # of the triplets looked at: the same for every cell


def audit(trainer: Trainer, vocabulary: AttributeVocabulary) -> Scores:
    """Figures over `QUERIES` training queries with the trained model.

    With exact labels (every triplet says what it allows, every attribute of the vocabulary has values), how the labelled target of a
    triplet that was trained on fares beside the unlabelled valid images (`relevance_suppression`): train_score_gap and
    train_target_ahead, 0 and 0.5 where the label made no difference. Where negatives were mined, what `_mined` counts.
    """
    data = trainer.data
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(data))[:QUERIES])
    queries, gallery = trainer.negatives.embeddings(rows)
    answers = Answers.of(data, vocabulary)
    scores = {} if trainer.negatives.mined is None else _mined(trainer, rows, queries, gallery, answers)
    if answers is None:
        return scores
    every = np.arange(len(data.images))
    hidden = [[at for at in ids if at >= 0] for ids in data.excluded[rows].tolist()]
    relevant = [np.nonzero(valid)[0].tolist() for valid in answers.among(rows, every)]
    found = relevance_suppression(score_rows(queries, gallery), data.target[rows], relevant, excluded=hidden)
    return scores | {"train_score_gap": found.score_gap, "train_target_ahead": found.target_ahead}


def _mined(
    trainer: Trainer, rows: NDArray[np.int64], queries: NDArray[np.float32], gallery: NDArray[np.float32], answers: Answers | None
) -> Scores:
    """What the mid zone holds when training ends, and where the picks of the last refresh lie by then.

    zone_pull: mean weight sigmoid(-Δ / τ) with which the ranking loss pulls at a pick of the mid zone as it is now.
    batch_is_harder: share of such picks that score below the hardest of batch_size - 1 random training targets.
    stale_in_mid, stale_in_near: where the picks of the last refresh lie now. With exact labels: zone_false_negatives and
    stale_false_negatives, the share of picks that are valid answers; zone_near_misses, those that are wrong in one attribute alone.
    Negatives that no zone gave (two drops) have the stale figures alone.
    """
    data, config = trainer.data, trainer.config
    assert trainer.negatives.mined is not None
    stale = trainer.negatives.mined[rows]
    zones = msgspec.structs.replace(config.trns.zones, policy="uniform")
    found = mine_negatives(queries, gallery, data.target[rows], zones=zones, picks=PICKS, exclude=data.excluded[rows])
    delta = found.anchor_scores[:, None] - _scores(queries, gallery, stale)
    picked, scores = found.picks >= 0, {}
    by_zones = config.trns.rule == "zones"
    if by_zones:
        if config.loss.ranking == "logistic":
            scores["zone_pull"] = _pull(found, float(torch.as_tensor(trainer.model.temperature(config.loss.temperature)).detach()))
        batch = np.random.default_rng(_SEED + 1).integers(len(data), size=(len(rows), trainer.batch_size - 1))
        others = data.target[batch]
        own = data.target[rows, None]
        hardest = np.where(others == own, -np.inf, _scores(queries, gallery, others)).max(axis=1)
        scores["batch_is_harder"] = _share(found.pick_scores < hardest[:, None], picked)
        scores["stale_in_near"] = _share(delta < found.lo[:, None], stale >= 0)
        scores["stale_in_mid"] = _share((delta >= found.lo[:, None]) & (delta <= found.hi[:, None]), stale >= 0)
    if answers is not None:
        wrong = answers.wrong(rows, np.concatenate([found.picks, stale], axis=1))
        now, then = wrong[:, :PICKS], wrong[:, PICKS:]
        if by_zones:
            scores["zone_false_negatives"] = _share(now == 0, picked)
            scores["zone_near_misses"] = _share(now == 1, picked)
        scores["stale_false_negatives"] = _share(then == 0, stale >= 0)
    return scores


def _scores(queries: NDArray[np.float32], gallery: NDArray[np.float32], images: NDArray[np.int64]) -> NDArray[np.float32]:
    """(S, P) scores of each query (S, D) against its own `images` (S, P), positions in `gallery` (I, M, D)."""
    parts = [max_sim(query[None], gallery[items])[0] for query, items in zip(queries, images, strict=True)]
    return np.stack(parts) if parts else np.zeros(images.shape, np.float32)


def _pull(found: MinedNegatives, temperature: float) -> PerQuery:
    picked = found.picks >= 0
    delta = np.where(picked, found.anchor_scores[:, None] - found.pick_scores, np.inf).astype(np.float64)
    return PerQuery((1 / (1 + np.exp(np.minimum(delta / temperature, 700.0)))).sum(axis=1), picked.sum(axis=1, dtype=np.float64))


def _share(of: NDArray[np.bool_], among: NDArray[np.bool_]) -> PerQuery:
    return PerQuery((of & among).sum(axis=1, dtype=np.float64), among.sum(axis=1, dtype=np.float64))
