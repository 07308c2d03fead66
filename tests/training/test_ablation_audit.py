"""Ablation's audit: what a part reads, and what a model that was trained owes to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.tiny_training import make_trainer, model_config, train_config

from dqe_training.ablation.audit import audit
from dqe_training.ablation.variants import apply_variant, parse_variant
from dqe_training.config import LossConfig
from dqe_training.data.answers import Answers
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.data.triplets import TripletData


@pytest.mark.parametrize(
    ("variant", "reads"),
    [
        ("+pool", False),
        ("+pool+law:unlabelled", False),
        ("+law:constant", False),
        ("+pool+kl", False),
        ("+kl:uniform", False),
        ("+law", True),
    ],
)
def test_what_reads_no_label_trains_the_same_without_labels(
    variant: str, reads: bool, tiny_data: tuple[TripletData, np.ndarray], tmp_path: Path
) -> None:
    """So that what a nameless pool gains is never put down to attributes."""
    data, pixels = tiny_data
    config = apply_variant(train_config(), parse_variant(variant), name=variant)
    blind = dataclasses.replace(data, labels=np.full_like(data.labels, -1), named=~data.named)
    states = [make_trainer(config, each, pixels, tmp_path / str(at)).train().state_dict() for at, each in enumerate((data, blind))]
    changed = any(not torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert changed == reads


def test_the_audit_of_a_trained_model(tiny_data: tuple[TripletData, np.ndarray], tmp_path: Path) -> None:
    """Held against ranks and scores worked out by hand."""
    data, pixels = tiny_data
    trainer = make_trainer(train_config(), *tiny_data, tmp_path)
    trainer.train()
    scores = audit(trainer, vocabulary())
    queries, gallery = trainer.negatives.embeddings(np.arange(len(data)))
    answers = Answers.of(data, vocabulary())
    assert answers is not None
    gaps, ahead = [], []
    for row in range(len(data)):
        by_image = (gallery @ queries[row]).max(axis=1)
        kept = [at for at in range(len(data.images)) if at != data.reference[row]]
        order = sorted(kept, key=lambda at: (-by_image[at], at))
        valid = answers.among(np.asarray([row]), np.arange(len(data.images)))[0]
        others = [at for at in kept if valid[at] and at != data.target[row]]
        if others:
            gaps.append(by_image[data.target[row]] - np.mean([by_image[at] for at in others]))
            ahead.append(np.mean([order.index(at) > order.index(data.target[row]) for at in others]))
    assert gaps
    assert scores["train_score_gap"].value == pytest.approx(np.mean(gaps), abs=1e-5)
    assert scores["train_target_ahead"].value == pytest.approx(np.mean(ahead), abs=1e-5)
    tau = trainer.config.loss.temperature
    assert 0 < scores["zone_pull"].value < 1
    learned = msgspec.structs.replace(model_config(), learned_temperature=True)
    other = make_trainer(train_config(learned), data, pixels, tmp_path / "learned")
    other.train()
    with torch.no_grad():
        other.model.temperature_log_scale.fill_(np.log(0.02 / tau))
    cold = audit(other, vocabulary())["zone_pull"].value
    with torch.no_grad():
        other.model.temperature_log_scale.fill_(0.0)
    assert cold < audit(other, vocabulary())["zone_pull"].value  # a lower τ pulls less at what scores below the target
    margin = msgspec.structs.replace(train_config(), loss=LossConfig(ranking="margin"))
    third = make_trainer(margin, data, pixels, tmp_path / "margin")
    third.train()
    assert "zone_pull" not in audit(third, vocabulary())
