"""Validation while training: it changes nothing, keeps the best model, and survives interruptions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.tiny_benchmarks import write_fashioniq
from support.tiny_training import make_trainer, model_config, train_config

from dqe_engine.errors import CheckpointError, InputError
from dqe_training.checkpointing.checkpoint import UNCALIBRATED_ZONES, load_checkpoint
from dqe_training.config import LoRAConfig
from dqe_training.data.public.fashioniq import FashionIQ
from dqe_training.data.triplets import TripletData
from dqe_training.evaluation.protocol import load_evaluation_set
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.split import EvaluationSplit, judge, judge_checkpoint
from dqe_training.features import writing
from dqe_training.run import trainer as trainer_module
from dqe_training.run import workflow
from dqe_training.run.trainer import Trainer, finish_run
from dqe_training.run.validation import Validation, Validator
from dqe_training.run.workflow import DataSource, train_run

Tiny = tuple[TripletData, np.ndarray]
Event = dict[str, Any]
CONFIGS = {
    "frozen": train_config(),
    "dropout": train_config(model_config(dropout=0.1)),
    "vision": train_config(vision_learning_rate=1e-4),
    "lora": msgspec.structs.replace(train_config(), finetune="lora", lora=LoRAConfig(rank=2, dropout=0.1)),
}


class StopError(Exception):
    """As a crash would."""


@pytest.fixture(scope="module")
def split(garments: Path) -> EvaluationSplit:
    return EvaluationSplit.of_folder(garments)


def log_of(run: Path, event: str) -> list[Event]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("seconds", "triplets_per_second")} for e in lines if e["event"] == event]


def scripted(split: EvaluationSplit, values: Sequence[float]) -> EvaluationSplit:
    """The split, whose headline takes `values` in turn."""
    turn = itertools.chain(values, itertools.repeat(0.0))
    return EvaluationSplit(split.name, split.headline, split.sets, lambda found: {split.headline: next(turn)})


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_the_same_with_and_without_it(name: str, tiny_data: Tiny, split: EvaluationSplit, tmp_path: Path) -> None:
    plain = make_trainer(CONFIGS[name], *tiny_data, tmp_path / "plain").train().state_dict()
    judged = make_trainer(CONFIGS[name], *tiny_data, tmp_path / "judged", validation=Validation(split, every=2)).train().state_dict()
    assert [key for key in plain if not torch.equal(plain[key], judged[key])] == []
    assert log_of(tmp_path / "plain", "step") == log_of(tmp_path / "judged", "step")
    found = log_of(tmp_path / "judged", "validation")
    assert [event["step"] for event in found] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert all({f"val/recall_at_{k}" for k in (1, 5, 10, 50)} <= event.keys() for event in found)


def test_its_figures_are_those_of_dqe_eval(tiny_data: Tiny, split: EvaluationSplit, garments: Path, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(learning_rate=1e-2), *tiny_data, tmp_path, validation=Validation(split))
    trainer.train()
    finish_run(tmp_path, tmp_path / "model")
    best, last = trainer.progress.best, trainer.progress.validated
    assert best is not None
    assert last is not None
    assert best.headline == "recall_at_10"
    assert best.value == pytest.approx(max(e["val/recall_at_10"] for e in log_of(tmp_path, "validation")), abs=1e-5)
    for name, found in (("best", best), ("model", last)):
        loaded = load_checkpoint(tmp_path / name)
        assert loaded.meta.progress.step == found.step
        evaluation = load_evaluation_set(garments)
        report, _ = evaluate_model(
            loaded.model, loaded.tokenizer, evaluation, encode_gallery_images(loaded.model, garments / "images", evaluation)
        )
        for figure in ("recall_at_1", "recall_at_10", "recall_at_50", "map_at_10"):
            assert found.figures[figure] == pytest.approx(getattr(report, figure), abs=1e-9)
        assert judge_checkpoint(tmp_path / name, split) == found.figures


def test_the_best_is_kept_and_the_earliest_of_equals(tiny_data: Tiny, split: EvaluationSplit, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(), *tiny_data, tmp_path, validation=Validation(scripted(split, [0.1, 0.5, 0.5, 0.4]), every=4))
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def listen(event: Event) -> None:
        if event["event"] == "step":
            seen[event["step"]] = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    trainer.listener = listen
    trainer.train()
    assert [(e["step"], e["best"]) for e in log_of(tmp_path, "validation")] == [(4, True), (8, True), (12, False), (15, False)]
    best = load_checkpoint(tmp_path / "best")
    assert best.meta.progress.step == 8
    assert best.meta.serving_zones != UNCALIBRATED_ZONES, "it can be exported as it is"
    assert [name for name, value in best.model.state_dict().items() if not torch.equal(value, seen[8][name])] == []
    assert trainer.progress.best is not None
    assert (trainer.progress.best.step, trainer.progress.best.value) == (8, 0.5)
    assert not (tmp_path / "best" / "state.safetensors").exists()


@pytest.mark.parametrize("name", ["dropout", "vision"])
@pytest.mark.parametrize("stop", [5, 9, 14])
def test_an_interrupted_run_ends_with_the_same_best(name: str, stop: int, tiny_data: Tiny, split: EvaluationSplit, tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if event["event"] in ("step", "validation") and event["step"] == stop:
            raise StopError

    def ended(run: Path) -> tuple[Any, ...]:
        trainer = make_trainer(CONFIGS[name], *tiny_data, run, validation=Validation(split, every=2))
        trainer.train()
        progress = trainer.progress
        return progress.best, progress.validated, log_of(run, "validation"), load_checkpoint(run / "best").model.state_dict()

    straight = ended(tmp_path / "straight")
    with pytest.raises(StopError):
        make_trainer(CONFIGS[name], *tiny_data, tmp_path / "run", validation=Validation(split, every=2), listener=fail).train()
    torch.manual_seed(99)
    resumed = ended(tmp_path / "run")
    assert resumed[:3] == straight[:3]
    assert all(torch.equal(straight[3][key], value) for key, value in resumed[3].items())


def test_a_kill_between_a_checkpoint_and_its_copy(
    tiny_data: Tiny, split: EvaluationSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint says that its model is the best, and best/ has an older one: a resume puts it there."""
    saved = 0
    save_best = Trainer._save_best

    def dying(trainer: Trainer) -> None:
        nonlocal saved
        saved += 1
        if saved == 2:
            raise StopError
        save_best(trainer)

    monkeypatch.setattr(Trainer, "_save_best", dying)
    values = [0.1, 0.5]
    with pytest.raises(StopError):
        make_trainer(train_config(), *tiny_data, tmp_path, validation=Validation(scripted(split, values), every=4)).train()
    assert load_checkpoint(tmp_path / "best").meta.progress.step == 4
    trainer = make_trainer(train_config(), *tiny_data, tmp_path, validation=Validation(scripted(split, []), every=4))
    trainer.train()
    assert load_checkpoint(tmp_path / "best").meta.progress.step == 8
    assert trainer.progress.best is not None
    assert trainer.progress.best.value == 0.5


def test_it_is_no_training_time(tiny_data: Tiny, split: EvaluationSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks when it is read, and that every validation moves by 1,000 s."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    validate = Validator.validate

    def slow(*arguments: Any) -> Any:
        nonlocal now
        now += 1000.0
        return validate(*arguments)

    monkeypatch.setattr(Validator, "validate", slow)
    monkeypatch.setattr(trainer_module.time, "perf_counter", clock)
    trainer = make_trainer(train_config(), *tiny_data, tmp_path, validation=Validation(split, every=2))
    trainer.train()
    assert now > 8000
    assert trainer.progress.seconds == 15 + 3, "a tick for each step and the beginning of each epoch"


def test_other_queries_are_refused_on_resuming(tiny_data: Tiny, garments: Path, split: EvaluationSplit, tmp_path: Path) -> None:
    make_trainer(train_config(epochs=1), *tiny_data, tmp_path, validation=Validation(split)).train()
    test = EvaluationSplit.of_folder(garments, "test")
    with pytest.raises(CheckpointError, match="best model was chosen by other queries; give the same, or use another run directory"):
        make_trainer(train_config(epochs=1), *tiny_data, tmp_path, validation=Validation(test)).train()
    make_trainer(train_config(epochs=1), *tiny_data, tmp_path, validation=Validation(split, every=3)).train()  # how often is free


def test_a_feature_cache_encodes_the_gallery_once(
    garments: Path, split: EvaluationSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = 0
    encode = writing.encode_pixels

    def counting(model: Any, pixels: Any) -> Any:
        nonlocal encoded
        encoded += len(pixels)
        return encode(model, pixels)

    monkeypatch.setattr(writing, "encode_pixels", counting)
    source = DataSource.from_directory(garments)
    options: dict[str, Any] = {"features": tmp_path / "cache", "validation": Validation(split)}
    trainer = train_run(train_config(), source, tmp_path / "run", **options)
    assert encoded == 64 + 60
    found = trainer.progress.validated
    assert found is not None
    assert judge(trainer.model, trainer.tokenizer, split, features=tmp_path / "cache") == found.figures
    assert encoded == 64 + 60


def test_its_images_count_against_memory(garments: Path, split: EvaluationSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = DataSource.from_directory(garments), train_config(epochs=1)
    need = 64 * (3 * 16 * 16 + 2 * 5 * 16)
    monkeypatch.setattr(workflow, "_physical_memory", lambda: int(need / 0.8) + 100)
    train_run(config, source, tmp_path / "plain")
    with pytest.raises(InputError, match=r"124 images take .* keep the tokens on disk with a feature cache .*, with --eval-every never"):
        train_run(config, source, tmp_path / "judged", validation=Validation(split))
    monkeypatch.setattr(workflow, "_physical_memory", lambda: int(need / 0.8) - 100)
    with pytest.raises(InputError, match=r"124 images take") as caught:  # they would not fit without the validation, either
        train_run(config, source, tmp_path / "judged", validation=Validation(split))
    assert "--eval-every" not in str(caught.value)


def test_a_public_dataset_is_judged_by_its_headline(tmp_path: Path) -> None:
    split = EvaluationSplit.of_benchmark(FashionIQ(write_fashioniq(tmp_path / "fashioniq")))
    assert (split.headline, split.images) == ("mean", 60)
    assert [placed.queries.name for placed in split.sets] == ["dress", "shirt", "toptee"]
    assert all(placed.queries.excluded is None for placed in split.sets), "FashionIQ keeps references in the ranking"


def test_the_splits_of_a_folder_are_told_apart(garments: Path, split: EvaluationSplit) -> None:
    assert split.identity == EvaluationSplit.of_folder(garments).identity
    assert split.identity != EvaluationSplit.of_folder(garments, "test").identity


def test_own_triplets_rank_the_images_that_they_name(garments: Path, tmp_path: Path) -> None:
    lines = (garments / "val.jsonl").read_text().splitlines()[:5]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    split = EvaluationSplit.of_triplets(tmp_path / "mine.jsonl", garments / "images")
    named = {json.loads(line)[key] for line in lines for key in ("reference", "target")}
    (placed,) = split.sets
    assert set(placed.names) == named
    assert [query.exclude for query in placed.queries.queries] == [(json.loads(line)["reference"],) for line in lines]
