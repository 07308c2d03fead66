"""What the mid zone holds when a training ends: false negatives by exact labels, how hard the picks pull, how stale they are."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.zones.mining import MinedNegatives, mine_negatives

from ..data.answers import Answers
from ..trainer import Trainer
from .scores import Ratio, Scores

QUERIES = 500
PICKS = 16
_SEED = 20  # of the triplets looked at: the same for every cell


def audit(trainer: Trainer, vocabulary: AttributeVocabulary) -> Scores:
    """Figures over `QUERIES` training queries with the trained model; none where the training mined nothing.

    zone_pull: mean weight sigmoid(-Δ / τ) with which the ranking loss pulls at a pick of the mid zone as it is now.
    batch_is_harder: share of such picks that score below the hardest of batch_size - 1 random training targets.
    stale_in_mid, stale_in_near: where the picks of the last refresh lie now. With exact labels (every triplet says what it
    allows, every attribute of the vocabulary has values): zone_false_negatives and stale_false_negatives, the share of picks
    that are valid answers; zone_near_misses, those that are wrong in one attribute alone.
    """
    data, config = trainer.data, trainer.config
    stale = trainer.negatives.mined
    if stale is None:
        return {}
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(data))[:QUERIES])
    queries, gallery = trainer.negatives.embeddings(rows)
    target, exclude = data.target[rows], data.excluded[rows]
    zones = msgspec.structs.replace(config.trns.zones, policy="uniform")
    found = mine_negatives(queries, gallery, target, zones=zones, picks=PICKS, exclude=exclude)
    picked = found.picks >= 0
    scores = {"zone_pull": _pull(found, config.loss.temperature)}
    batch = np.random.default_rng(_SEED + 1).integers(len(data), size=(len(rows), trainer.batch_size - 1))
    others = data.target[batch]
    hardest = np.where(others == target[:, None], -np.inf, _scores(queries, gallery, others)).max(axis=1)
    scores["batch_is_harder"] = _share(found.pick_scores < hardest[:, None], picked)
    stale = stale[rows]
    delta = found.anchor_scores[:, None] - _scores(queries, gallery, stale)
    scores["stale_in_near"] = _share(delta < found.lo[:, None], stale >= 0)
    scores["stale_in_mid"] = _share((delta >= found.lo[:, None]) & (delta <= found.hi[:, None]), stale >= 0)
    if (answers := Answers.of(data, vocabulary)) is not None:
        wrong = answers.wrong(rows, np.concatenate([found.picks, stale], axis=1))
        now, then = wrong[:, :PICKS], wrong[:, PICKS:]
        scores["zone_false_negatives"] = _share(now == 0, picked)
        scores["zone_near_misses"] = _share(now == 1, picked)
        scores["stale_false_negatives"] = _share(then == 0, stale >= 0)
    return scores


def _scores(queries: NDArray[np.float32], gallery: NDArray[np.float32], images: NDArray[np.int64]) -> NDArray[np.float32]:
    """(S, P) MaxSim scores of each query against its own `images` (S, P)."""
    parts = [(gallery[items] @ query).max(axis=1) for query, items in zip(queries, images, strict=True)]
    return np.stack(parts) if parts else np.zeros(images.shape, np.float32)


def _pull(found: MinedNegatives, temperature: float) -> Ratio:
    picked = found.picks >= 0
    delta = np.where(picked, found.anchor_scores[:, None] - found.pick_scores, np.inf).astype(np.float64)
    return Ratio.of((1 / (1 + np.exp(np.minimum(delta / temperature, 700.0)))).sum(axis=1), picked.sum(axis=1))


def _share(of: NDArray[np.bool_], among: NDArray[np.bool_]) -> Ratio:
    return Ratio.of((of & among).sum(axis=1), among.sum(axis=1))
