"""TRNS in training: when negatives are mined, from which queries and candidates, and with which random numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.tiny_benchmarks import write_cirr, write_fashioniq
from support.tiny_training import make_trainer, model_config, train_config

from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY
from dqe_engine.contracts.zones import ZoneSpec
from dqe_training.config import TRNSConfig
from dqe_training.data.public.cirr import CIRR
from dqe_training.data.public.fashioniq import FashionIQ
from dqe_training.data.public.placing import BenchmarkSource
from dqe_training.data.triplets import TripletData
from dqe_training.trns import refreshing as refresh_module

Tiny = tuple[TripletData, np.ndarray]
Event = dict[str, Any]


@pytest.mark.parametrize(
    ("warmup", "interval", "enabled", "expected"),
    [(1, 1, True, [1, 2, 3, 4]), (2, 2, True, [2, 4]), (0, 3, True, [0, 3]), (0, 1, False, [])],
)
def test_negatives_are_mined_after_warm_up_at_intervals(
    warmup: int, interval: int, enabled: bool, expected: list[int], tiny_data: Tiny, tmp_path: Path
) -> None:
    config = train_config(epochs=5)
    trns = TRNSConfig(enabled=enabled, warmup_epochs=warmup, interval=interval, picks=4, zones=config.trns.zones)
    events: list[Event] = []
    make_trainer(msgspec.structs.replace(config, trns=trns), *tiny_data, tmp_path, listener=events.append).train()
    refreshes = [e for e in events if e["event"] == "refresh"]
    assert [e["epoch"] for e in refreshes] == expected
    assert all(0 <= e["empty"] < 1 for e in refreshes)
    assert all(0 <= e["lo"] < e["hi"] for e in refreshes)  # what the pooled bounds came to
    ranked = {e["epoch"] for e in events if e["event"] == "step" and "loss/rank" in e}
    assert ranked == (set(range(warmup, 5)) if enabled else set())


def test_mining_sees_every_query_and_the_whole_gallery(tiny_data: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = tiny_data
    calls: list[tuple[np.ndarray, ...]] = []
    seeds: list[int] = []
    mine = refresh_module.mine_negatives

    def spy(queries: np.ndarray, tokens: np.ndarray, targets: np.ndarray, *, zones: Any, exclude: np.ndarray, **options: Any) -> Any:
        calls.append((queries.copy(), tokens, targets, exclude))
        seeds.append(zones.seed)
        mined = mine(queries, tokens, targets, zones=zones, exclude=exclude, **options)
        assert not (mined.picks == targets[:, None]).any()
        assert not (mined.picks == exclude).any()
        return mined

    monkeypatch.setattr(refresh_module, "mine_negatives", spy)
    make_trainer(train_config(batch_size=7, epochs=4), *tiny_data, tmp_path).train()
    assert len(calls) == 3
    assert len(set(seeds)) == 3
    for queries, tokens, targets, exclude in calls:
        assert tokens.shape == (len(data.images), 3, 8)
        assert np.isfinite(queries).all()  # the remainder of an epoch, too
        np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
        assert targets is data.target
        np.testing.assert_array_equal(exclude[:, 0], data.reference)


def test_mined_queries_are_what_the_model_says_in_evaluation_mode(tiny_data: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, a query of a training step is another one; all queries of a refresh come from one mode and one model."""
    trainer = make_trainer(train_config(model_config(dropout=0.5)), *tiny_data, tmp_path)
    mine, calls = refresh_module.mine_negatives, 0

    def spy(queries: np.ndarray, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        assert trainer.model.training
        now, _ = trainer.negatives.embeddings(np.arange(len(queries)))
        np.testing.assert_array_equal(queries, now)
        return mine(queries, *arguments, **options)

    monkeypatch.setattr(refresh_module, "mine_negatives", spy)
    trainer.train()
    assert calls == 2


def mined_by(seed: int, tiny: Tiny, run: Path, *, epoch: int = 1) -> np.ndarray:
    """What a training of that seed mines from the weights of seed 0: (T, P), sorted."""
    trainer = make_trainer(train_config(seed=seed), *tiny, run)
    trainer.model.load_state_dict(make_trainer(train_config(), *tiny, run).model.state_dict())
    trainer._images.prepare(lambda event: None)
    trainer.negatives.refresh(epoch)
    assert trainer.negatives.mined is not None
    return np.sort(trainer.negatives.mined, axis=1)


def test_two_seeds_mine_and_draw_differently(tiny_data: Tiny, tmp_path: Path) -> None:
    first = mined_by(0, tiny_data, tmp_path)
    np.testing.assert_array_equal(first, mined_by(0, tiny_data, tmp_path))
    assert (first != mined_by(1, tiny_data, tmp_path)).any(axis=1).mean() > 0.8
    assert (first != mined_by(0, tiny_data, tmp_path, epoch=2)).any(axis=1).mean() > 0.8
    rows = np.arange(len(tiny_data[0]))
    drawn = []
    for seed in (0, 1):
        trainer = make_trainer(train_config(seed=seed), *tiny_data, tmp_path)
        trainer.negatives.restore({"mined": torch.from_numpy(first)})
        drawn.append(trainer.negatives.draw(rows, 1))
    assert (drawn[0] != drawn[1]).mean() > 0.5


def test_negatives_between_the_two_drops(tiny_data: Tiny, tmp_path: Path) -> None:
    config = train_config()
    config = msgspec.structs.replace(config, trns=msgspec.structs.replace(config.trns, rule="two-drops"))
    trainer = make_trainer(config, *tiny_data, tmp_path)
    trainer.train()
    trainer.negatives.refresh(3)
    data, mined = trainer.data, trainer.negatives.mined
    assert mined is not None
    queries, tokens = trainer.negatives.embeddings(np.arange(len(data)))
    scores = np.einsum("td,imd->tim", queries, tokens).max(axis=2)
    rows = np.nonzero(mined[:, 0] >= 0)[0]
    assert len(rows) > len(data) / 4
    for row in rows:
        assert (scores[row, mined[row][mined[row] >= 0]] < scores[row, data.target[row]]).all()


def test_references_are_candidates_where_the_protocol_ranks_them(tiny_data: Tiny, tmp_path: Path) -> None:
    data, pixels = tiny_data
    everything = TRNSConfig(warmup_epochs=0, picks=len(data.images), zones=ZoneSpec(lo=-4.0, hi=4.0))
    config = msgspec.structs.replace(train_config(), trns=everything)
    for ranked in (False, True):
        trainer = make_trainer(config, dataclasses.replace(data, references_ranked=ranked), pixels, tmp_path)
        trainer._images.prepare(lambda event: None)
        trainer.negatives.refresh(0)
        assert trainer.negatives.mined is not None
        assert (trainer.negatives.mined == data.reference[:, None]).any(axis=1).tolist() == [ranked] * len(data)
        assert not (trainer.negatives.mined == data.target[:, None]).any()


def test_the_public_datasets_say_whether_references_are_ranked(tmp_path: Path) -> None:
    fashioniq = BenchmarkSource.open(FashionIQ(write_fashioniq(tmp_path / "fashioniq"))).read(PAPER_VOCABULARY)
    cirr = BenchmarkSource.open(CIRR(write_cirr(tmp_path / "cirr"))).read(PAPER_VOCABULARY)
    assert (fashioniq.references_ranked, cirr.references_ranked) == (True, False)
    assert set(fashioniq.excluded[:, 0].tolist()) == {-1}
    np.testing.assert_array_equal(cirr.excluded[:, 0], cirr.reference)
