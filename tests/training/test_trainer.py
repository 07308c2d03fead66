"""Training: it learns, and what was interrupted ends as if it had not been, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.signals import interrupts_heard  # noqa: F401 (used by every test here)
from support.tiny_training import flip_byte, make_trainer, model_config, train_config

from dqe_engine.errors import CheckpointError, InputError
from dqe_training.checkpointing.checkpoint import load_checkpoint, load_state
from dqe_training.checkpointing.meta import OLDEST_RESUMED
from dqe_training.config import LossConfig, TrainConfig, TRNSConfig
from dqe_training.data.triplets import TripletData, build_triplets
from dqe_training.run.trainer import Trainer, data_hash, finish_run

Tiny = tuple[TripletData, np.ndarray]
Event = dict[str, Any]

# Everything that has state: negatives from the second epoch on, dropout's random numbers, a vision tower that trains.
CONFIGS = {
    "frozen": train_config(),
    "dropout": train_config(model_config(dropout=0.1)),
    "vision": train_config(vision_learning_rate=1e-4),
    "odd batch": train_config(batch_size=7),  # queries that an epoch does not reach
    "infonce": train_config(model_config(attribute_weights=False), loss=LossConfig(objective="infonce"), trns=TRNSConfig(enabled=False)),
}
STEPS = 15


def events_of(run: Path) -> list[Event]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(events: list[Event]) -> list[Event]:
    return [{k: v for k, v in e.items() if k not in ("triplets_per_second", "seconds")} for e in events]


def train(config: TrainConfig, tiny: Tiny, run: Path, **options: Any) -> dict[str, torch.Tensor]:
    return make_trainer(config, *tiny, run, **options).train().state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def straight(tiny_data: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, torch.Tensor], list[Event]]]:
    """Uninterrupted runs, by configuration: final parameters and logged events."""
    made = {}
    for name, config in CONFIGS.items():
        run = tmp_path_factory.mktemp("straight")
        made[name] = train(config, tiny_data, run), events_of(run)
    return made


class StopError(Exception):
    """Raised by a listener: as abrupt as an error inside the step."""


def stopper(step: int, action: Any) -> Any:
    def listen(event: Event) -> None:
        if event["event"] == "step" and event["step"] == step:
            action()

    return listen


def fail() -> None:
    raise StopError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# -- learning --------------------------------------------------------------------------------------------------------------


def test_a_few_triplets_are_learnt_by_heart(tiny_data: Tiny, tmp_path: Path) -> None:
    config = train_config(epochs=30, learning_rate=1e-2, checkpoint_every=10_000)
    train(config, tiny_data, tmp_path)
    losses = [e["loss/total"] for e in events_of(tmp_path)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_what_is_logged(straight: dict[str, Any]) -> None:
    _, events = straight["frozen"]
    assert [e["step"] for e in events] == list(range(1, STEPS + 1))
    assert [e["epoch"] for e in events] == [0] * 5 + [1] * 5 + [2] * 5
    assert all("loss/rank" not in e for e in events[:5])
    assert all("loss/rank" in e for e in events[5:])  # negatives are there from the second epoch on
    assert {"loss/kl", "loss/attribute", "loss/presence", "loss/total"} <= events[0].keys()
    fractions = [e["fraction"] for e in events]
    assert fractions == pytest.approx([step / STEPS for step in range(1, STEPS + 1)], abs=1e-5)
    rates = [e["learning_rate"] for e in events]
    assert rates[0] < max(rates) <= 1e-3
    assert rates[-1] < 0.1 * max(rates)
    assert max(rates) in rates[:3]
    assert "loss/infonce" in straight["infonce"][1][0]


def test_only_what_should_train_trains(tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    start = make_trainer(train_config(), *tiny_data, tmp_path).model.state_dict()
    changed = {name for name, value in straight["frozen"][0].items() if not torch.equal(value, start[name])}
    assert not any(name.startswith("vision_model.") for name in changed)
    assert any(name.startswith("qformer.") for name in changed)
    assert any(name.startswith("attribute_heads.") for name in changed)
    changed = {name for name, value in straight["vision"][0].items() if not torch.equal(value, start[name])}
    assert any(name.startswith("vision_model.") for name in changed)


def test_training_by_the_clock_ends(tiny_data: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(seconds=0.3, epochs=1), *tiny_data, tmp_path)
    trainer.train()
    assert trainer.progress.finished
    assert 0.3 <= trainer.progress.seconds < 3
    assert events_of(tmp_path)[-1]["fraction"] <= 1


def test_a_number_of_steps_may_end_within_an_epoch(tiny_data: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(steps=3, epochs=1), *tiny_data, tmp_path)
    trainer.train()
    assert (trainer.progress.step, trainer.fraction()) == (3, 1.0)
    assert trainer.steps_per_epoch != 3


def test_a_finished_run_is_left_alone(tiny_data: Tiny, tmp_path: Path) -> None:
    config = train_config(epochs=1)
    first = train(config, tiny_data, tmp_path)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    events: list[Event] = []
    assert_same(train(config, tiny_data, tmp_path, listener=events.append), first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    assert [e["event"] for e in events if e["event"] != "encode"] == ["resume"]


def test_two_checkpoints_are_kept(tiny_data: Tiny, tmp_path: Path) -> None:
    train(train_config(), tiny_data, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "step-00000012", "step-00000015"]


def test_finishing_leaves_out_what_only_resuming_needs(tiny_data: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        finish_run(tmp_path, tmp_path / "model")
    final = train(train_config(epochs=1), tiny_data, tmp_path)
    finish_run(tmp_path, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    assert_same(loaded.model.state_dict(), final)
    assert not (tmp_path / "model" / "state.safetensors").exists()
    assert loaded.meta.progress.finished
    with pytest.raises(CheckpointError, match="exists already"):
        finish_run(tmp_path, tmp_path / "model")
    finish_run(tmp_path, tmp_path / "model", replace=True)
    with pytest.raises(CheckpointError, match="not resumed"):
        load_state(tmp_path / "model")


# -- resuming --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step", [8, 10])  # within the epoch that has negatives; at its end
def test_a_failed_run_resumes_exactly(name: str, step: int, tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIGS[name]
    with pytest.raises(StopError):
        train(config, tiny_data, tmp_path, listener=stopper(step, fail))
    torch.manual_seed(99)  # another process has another random state
    events: list[Event] = []
    parameters = train(config, tiny_data, tmp_path, listener=events.append)
    assert [e["step"] for e in events if e["event"] == "resume"] == [step // 3 * 3]
    assert_same(parameters, straight[name][0])
    assert without_times(events_of(tmp_path)) == without_times(straight[name][1])


@pytest.mark.parametrize("step", [1, 5, 7, 15])
def test_an_interrupted_run_resumes_exactly(step: int, tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(CONFIGS["dropout"], tiny_data, tmp_path, listener=stopper(step, interrupt if step % 3 else terminate))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (tmp_path / f"step-{step:08d}").is_dir()  # where it was stopped, not at the last third step
    torch.manual_seed(99)
    assert_same(train(CONFIGS["dropout"], tiny_data, tmp_path), straight["dropout"][0])
    assert without_times(events_of(tmp_path)) == without_times(straight["dropout"][1])


def test_many_interruptions(tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    for step in range(2, STEPS, 2):
        with pytest.raises(KeyboardInterrupt):
            train(CONFIGS["odd batch"], tiny_data, tmp_path, listener=stopper(step, interrupt))
    assert_same(train(CONFIGS["odd batch"], tiny_data, tmp_path), straight["odd batch"][0])
    assert without_times(events_of(tmp_path)) == without_times(straight["odd batch"][1])


def test_training_in_a_thread(tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    """Signals are the main thread's; elsewhere training works without them."""
    results: list[dict[str, torch.Tensor]] = []
    thread = threading.Thread(target=lambda: results.append(train(CONFIGS["frozen"], tiny_data, tmp_path)))
    thread.start()
    thread.join()
    assert_same(results[0], straight["frozen"][0])


def stopped_run(tiny: Tiny, run: Path, step: int = 8) -> Path:
    with pytest.raises(StopError):
        train(CONFIGS["frozen"], tiny, run, listener=stopper(step, fail))
    return run


def test_a_damaged_checkpoint_is_passed_over(tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    run = stopped_run(tiny_data, tmp_path)
    assert {p.name for p in run.glob("step-*")} == {"step-00000003", "step-00000006"}
    flip_byte(run / "step-00000006" / "state.safetensors")
    events: list[Event] = []
    assert_same(train(CONFIGS["frozen"], tiny_data, run, listener=events.append), straight["frozen"][0])
    assert [e["step"] for e in events if e["event"] == "resume"] == [3]
    assert without_times(events_of(run)) == without_times(straight["frozen"][1])


def test_when_all_are_damaged_nothing_is_lost(tiny_data: Tiny, tmp_path: Path) -> None:
    run = stopped_run(tiny_data, tmp_path)
    for checkpoint in run.glob("step-*"):
        flip_byte(checkpoint / "model.safetensors")
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="step-00000006"):
        train(CONFIGS["frozen"], tiny_data, run)
    assert (run / "metrics.jsonl").read_bytes() == log
    assert len(list(run.glob("step-*"))) == 2


@pytest.mark.parametrize("cut", [1, 20, 100_000])
def test_a_log_cut_short_is_mended(tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path, cut: int) -> None:
    run = stopped_run(tiny_data, tmp_path)
    log = run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    log.write_bytes(b"".join(lines[:-1]) + lines[-1][:-cut])
    train(CONFIGS["frozen"], tiny_data, run)
    assert without_times(events_of(run)) == without_times(straight["frozen"][1])


def test_a_log_without_a_checkpoint_starts_anew(tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    stopped_run(tiny_data, tmp_path, step=2)
    assert len(events_of(tmp_path)) == 2
    train(CONFIGS["frozen"], tiny_data, tmp_path)
    assert without_times(events_of(tmp_path)) == without_times(straight["frozen"][1])


@pytest.mark.parametrize("version", range(1, OLDEST_RESUMED))
def test_the_run_of_an_earlier_version_is_refused_as_that(version: int, tiny_data: Tiny, tmp_path: Path) -> None:
    """Whatever else differs: its configuration cannot be given again."""
    run = stopped_run(tiny_data, tmp_path)
    for path in run.glob("step-*/checkpoint.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    for config in (CONFIGS["frozen"], train_config(learning_rate=2e-3)):
        with pytest.raises(CheckpointError, match="made by an earlier version, whose runs are not resumed; use another run directory"):
            train(config, tiny_data, run)


def test_the_run_of_an_earlier_version_that_trained_alike_goes_on(tiny_data: Tiny, straight: dict[str, Any], tmp_path: Path) -> None:
    """Only the record's form has changed."""
    run = stopped_run(tiny_data, tmp_path)
    for path in run.glob("step-*/checkpoint.json"):
        record = json.loads(path.read_text()) | {"schema_version": OLDEST_RESUMED}
        del record["kind"]
        path.write_text(json.dumps(record))
    train(CONFIGS["frozen"], tiny_data, run)
    assert without_times(events_of(run)) == without_times(straight["frozen"][1])


def test_other_settings_are_refused(tiny_data: Tiny, tmp_path: Path) -> None:
    run = stopped_run(tiny_data, tmp_path)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="another configuration"):
        train(train_config(learning_rate=2e-3), tiny_data, run)
    data, pixels = tiny_data
    fewer = build_triplets(data.records[:-1], make_trainer(train_config(), *tiny_data, run).model.vocabulary)
    with pytest.raises(CheckpointError, match="other training data"):
        train(CONFIGS["frozen"], (fewer, pixels[: len(fewer.images)]), run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_another_tokenizer_is_refused(tiny_data: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights belong to the ids of one vocabulary; another order of the same words would scramble them in silence."""
    run = stopped_run(tiny_data, tmp_path)
    trainer = make_trainer(CONFIGS["frozen"], *tiny_data, run)
    other = json.loads(trainer.tokenizer.to_str())
    vocab = other["model"]["vocab"]
    words = sorted(vocab, key=vocab.__getitem__)
    vocab[words[-1]], vocab[words[-2]] = vocab[words[-2]], vocab[words[-1]]
    tokenizer = type(trainer.tokenizer).from_str(json.dumps(other))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        Trainer(trainer.model, tokenizer, CONFIGS["frozen"], *tiny_data, run).train()


def test_the_data_hash_sees_every_part(tiny_data: Tiny) -> None:
    data, pixels = tiny_data
    changes = {
        "images": (*data.images[:-1], "other.jpg"), "texts": (*data.texts[:-1], "in teal"), "reference": data.reference[::-1],
        "target": data.target[::-1], "named": ~data.named, "labels": data.labels[::-1],
    }  # fmt: skip
    hashes = {data_hash(data, pixels), data_hash(data, 255 - pixels)}
    hashes |= {data_hash(TripletData(**{**vars(data), name: value}), pixels) for name, value in changes.items()}
    assert len(hashes) == 8


# -- errors ----------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_an_error(tiny_data: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(), *tiny_data, tmp_path)
    with torch.no_grad():
        trainer.model.query_tokens[0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"the loss is nan at step 0; lower optim\.learning_rate"):
        trainer.train()
    assert list(tmp_path.glob("step-*")) == []


def test_one_triplet_is_too_few(tiny_data: Tiny, tmp_path: Path) -> None:
    data, pixels = tiny_data
    one = build_triplets(data.records[:1], make_trainer(train_config(), *tiny_data, tmp_path).model.vocabulary)
    with pytest.raises(InputError, match="at least 2"):
        make_trainer(train_config(), one, pixels[:2], tmp_path)


def test_a_batch_larger_than_the_data_is_the_data(tiny_data: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(batch_size=1000, epochs=1), *tiny_data, tmp_path)
    assert (trainer.batch_size, trainer.steps_per_epoch) == (40, 1)
    trainer.train()


def test_a_clip_norm_of_zero_does_not_clip(tiny_data: Tiny, tmp_path: Path) -> None:
    unclipped = train(train_config(epochs=1, clip_norm=0.0), tiny_data, tmp_path / "off")
    assert_same(unclipped, train(train_config(epochs=1, clip_norm=1e9), tiny_data, tmp_path / "far"))
    start = make_trainer(train_config(), *tiny_data, tmp_path).model.state_dict()
    assert not torch.equal(unclipped["query_tokens"], start["query_tokens"])


def test_a_run_directory_that_cannot_be(tiny_data: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be the run directory"):
        train(train_config(), tiny_data, tmp_path / "file")


def test_tokens_of_a_tower_that_trains_are_refused(tiny_data: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(), *tiny_data, tmp_path)
    with pytest.raises(InputError, match="frozen tower"):
        Trainer(trainer.model, trainer.tokenizer, CONFIGS["vision"], *tiny_data, tmp_path, image_tokens=torch.zeros(64, 5, 16))
