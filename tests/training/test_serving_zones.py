"""The zones that a bundle serves with: bounds from the training set, carried from the run to the model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from support.tiny_training import make_trainer, train_config

from dqe_engine.contracts.zones import ZoneSpec
from dqe_training.checkpointing.checkpoint import UNCALIBRATED_ZONES, load_checkpoint
from dqe_training.data.triplets import TripletData
from dqe_training.run.trainer import finish_run
from dqe_training.trns.serving_zones import calibrate_zones


@pytest.mark.parametrize("gallery", [3, 40, 250])
def test_bounds_equal_brute_force(gallery: int) -> None:
    rng = np.random.default_rng(gallery)
    queries = (rng.integers(-8, 9, (21, 8)) / 16).astype(np.float32)
    tokens = (rng.integers(-8, 9, (gallery, 2, 8)) / 16).astype(np.float32)
    targets, references = rng.integers(0, gallery, (2, 21))
    lo, hi = [], []
    for row, query in enumerate(queries):
        scores = [max(float(query @ token) for token in item) for item in tokens]
        ranked = sorted((s for i, s in enumerate(scores) if i != references[row]), reverse=True)
        lo.append(ranked[0] - scores[targets[row]])
        hi.append(ranked[0] - ranked[math.floor(0.02 * (len(ranked) - 1))])
    zones = calibrate_zones(queries, tokens, targets, references)
    near = max(0.01, float(np.median(lo)))
    assert zones.lo == pytest.approx(near, abs=1e-4)
    assert zones.hi == pytest.approx(max(near, float(np.median(hi))), abs=1e-4)
    assert (zones.bounds, zones.policy) == ("absolute", "hardest")


def test_a_perfect_model_still_has_a_near_zone() -> None:
    items = np.eye(4, dtype=np.float32)[:, None, :]
    rows = np.arange(4)
    zones = calibrate_zones(items[:, 0], items, rows, (rows + 1) % 4)
    assert zones == ZoneSpec(lo=0.01, hi=0.01, policy="hardest")


def test_they_come_with_the_end_of_training(tiny_data: tuple[TripletData, np.ndarray], tmp_path: Path) -> None:
    seen: list[ZoneSpec] = []
    trainer = make_trainer(train_config(), *tiny_data, tmp_path)
    trainer.listener = lambda event: seen.append(trainer.serving_zones)
    trainer.train()
    assert set(map(str, seen)) == {str(UNCALIBRATED_ZONES)}
    assert trainer.serving_zones != UNCALIBRATED_ZONES
    finish_run(tmp_path, tmp_path / "model")
    assert load_checkpoint(tmp_path / "model").meta.serving_zones == trainer.serving_zones
    again = make_trainer(train_config(), *tiny_data, tmp_path)
    again.train()
    assert again.serving_zones == trainer.serving_zones
