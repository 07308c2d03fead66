"""Training that begins with a checkpoint: what is taken over, what may be set over it, and what may not change on resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.tiny_training import flip_byte, make_model, make_trainer, model_config, train_config, write_checkpoint

from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY, AttributeVocabulary
from dqe_engine.errors import CheckpointError, InputError
from dqe_training.checkpointing.checkpoint import Progress, load_checkpoint, read_meta, save_checkpoint
from dqe_training.cli import train
from dqe_training.config import TrainConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.model import DQEModel
from dqe_training.run.configuration import load_config
from dqe_training.run.trainer import finish_run
from dqe_training.run.workflow import build_model, make_tokenizer, vision_dtype

CUT = AttributeVocabulary(attributes=vocabulary().attributes[:2])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tests only read."""
    return write_checkpoint(tmp_path_factory.mktemp("start") / "model")


def config_of(start: Path, *overrides: str) -> TrainConfig:
    return load_config("start", [f"start={start}", "optim.batch_size=8", *overrides])


def build(config: TrainConfig, vocab: AttributeVocabulary | None = None) -> tuple[DQEModel, str]:
    said: list[str] = []
    size = make_tokenizer(config, []).get_vocab_size()
    model = build_model(config, vocab or vocabulary(), size, listener=lambda event: said.append(event["text"]))
    (text,) = said
    return model, text


def weights(model: DQEModel, *, heads: bool) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith("attribute_heads.") == heads}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(value, b[name]) for name, value in a.items())


# -- what is taken over ----------------------------------------------------------------------------------------------------


def test_model_and_tokenizer_are_the_checkpoints(start: Path) -> None:
    config, made = config_of(start), load_checkpoint(start)
    assert config.model == made.meta.config.model
    assert make_tokenizer(config, ["other texts"]).get_vocab() == made.tokenizer.get_vocab()
    model, said = build(config)
    assert equal(model.state_dict(), made.model.state_dict())
    assert said == f"starting with {start}: attribute heads taken over (colour, shape, pattern, length)"


def test_heads_of_other_attributes_are_drawn_anew_from_the_seed(start: Path) -> None:
    made = load_checkpoint(start).model
    (first, said), (again, _), (other, _) = (build(config_of(start, f"optim.seed={seed}"), CUT) for seed in (3, 3, 4))
    assert said == f"starting with {start}: attribute heads drawn anew (colour, shape; there colour, shape, pattern, length)"
    for model in (first, other):
        assert equal(weights(model, heads=False), weights(made, heads=False))
    assert equal(first.state_dict(), again.state_dict())
    assert not equal(weights(first, heads=True), weights(other, heads=True))


def test_heads_have_the_order_of_their_attributes(start: Path) -> None:
    turned = AttributeVocabulary(attributes=vocabulary().attributes[::-1])
    assert "drawn anew (length, pattern, shape, colour; there colour," in build(config_of(start), turned)[1]
    wordier = AttributeVocabulary(attributes=tuple(msgspec.structs.replace(a, words=(*a.words, "hue")) for a in vocabulary().attributes))
    assert "taken over" in build(config_of(start), wordier)[1], "words are what the heads learn from, not what they are"


def test_heads_of_a_baseline_are_untrained(tmp_path: Path) -> None:
    baseline = write_checkpoint(tmp_path / "model", model_config(attribute_weights=False))
    config = config_of(baseline, "model.attribute_weights=true", "finetune=attributes")
    model, said = build(config)
    assert said.endswith("drawn anew (colour, shape, pattern, length; there untrained)")
    assert not equal(weights(model, heads=True), weights(load_checkpoint(baseline).model, heads=True))
    assert config_of(baseline, "finetune=attributes") == config  # who trains heads wants them
    with pytest.raises(InputError, match=r"finetune attributes trains the attribute heads, but model\.attribute_weights is false"):
        config_of(baseline, "finetune=attributes", "model.attribute_weights=false")


# -- what may be set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "assignment", ["qformer.dropout=0.1", "qformer.pooled=true", "preprocessing.fit=target_pad", "attribute_weights=false"]
)
def test_what_may_be_set_over_a_checkpoint(start: Path, assignment: str) -> None:
    config = config_of(start, f"model.{assignment}")
    assert config.model != load_checkpoint(start).meta.config.model
    build(config)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (
            ["model.qformer.hidden_size=32"],
            "model.qformer.hidden_size 16, the configuration sets 32, but its weights are for that alone",
        ),
        (["model.qformer.heads=4"], "model.qformer.heads 2, the configuration sets 4"),
        (["model.qformer.max_text_length=16"], "model.qformer.max_text_length 32, the configuration sets 16"),
        (["model.vision.activation=quick_gelu"], "model.vision.activation gelu"),
        (["model.preprocessing.image_size=32"], "model.preprocessing.image_size 16"),
        (["finetune=attributes", "model.qformer.pooled=true"], "finetune attributes keeps its encoder as it is; leave it out"),
        (["finetune=attributes", "model.preprocessing.fit=target_pad"], "model.preprocessing.fit stretch"),
    ],
)
def test_what_contradicts_the_checkpoint(start: Path, assignments: list[str], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_of(start, *assignments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    config = config_of(start)
    wrong = msgspec.structs.replace(config, model=model_config(hidden_size=32))
    with pytest.raises(CheckpointError, match="hidden_size 16"):  # without load_config
        build(wrong)


def test_texts_may_be_shorter_than_a_position_table(tmp_path: Path) -> None:
    config = config_of(write_checkpoint(tmp_path / "model", model_config(position_embeddings=32)), "model.qformer.max_text_length=16")
    assert build(config)[0].embeddings.position_embeddings.num_embeddings == 32


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["vision_weights=garments"], "brings all weights, so backbone and vision_weights must be empty, got garments"),
        (["backbone=a/b"], "brings all weights, so backbone and vision_weights must be empty, got a/b"),
        (["finetune=attributes", "optim.vision_learning_rate=1e-4"], "so optim.vision_learning_rate must be 0, got 0.0001"),
        (["finetune=attributes", "optim.vision_precision=float16"], "so set vision_precision to auto, got float16"),
        (["start=", "finetune=attributes"], "no model section; add one, or name a checkpoint"),
    ],
)
def test_settings_that_exclude_one_another(start: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        config_of(start, *overrides)
    assert said in str(caught.value)


def test_heads_alone_need_an_encoder() -> None:
    with pytest.raises(InputError, match="so set start to a checkpoint of dqe-train that has one"):
        load_config("garments", ["finetune=attributes"])


def test_no_checkpoint_there(start: Path, tmp_path: Path, garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(garments), "--out", str(tmp_path / "run"), f"start={tmp_path}"]
    assert train.main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"start {tmp_path}: not a checkpoint (no checkpoint.json); give a directory that dqe-train wrote")
    assert "\n" not in said
    damaged = shutil.copytree(start, tmp_path / "model")
    for name in ("tokenizer.json", "model.safetensors"):
        flip_byte(damaged / name)
        arguments[-1] = f"start={damaged}"
        assert train.main(arguments) == 2
        assert f"{name}: damaged" in capsys.readouterr().err
        shutil.copy(start / name, damaged / name)


def test_a_frozen_tower_stays_in_its_precision(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = make_model(vocab_size=load_checkpoint(start).tokenizer.get_vocab_size())
    half.vision_model.to(torch.bfloat16)
    save_checkpoint(tmp_path / "model", half, load_checkpoint(start).tokenizer, config=train_config(), progress=Progress())
    alone, full = (config_of(tmp_path / "model", f"finetune={mode}") for mode in ("attributes", "full"))
    assert {vision_dtype(alone), vision_dtype(full)} == {torch.float32}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vision_dtype(alone) == torch.bfloat16
    assert vision_dtype(config_of(start, "finetune=attributes")) == torch.float32
    assert vision_dtype(full) == torch.float16


# -- training --------------------------------------------------------------------------------------------------------------


def test_a_run_remembers_what_it_began_with(start: Path, tiny_data: Any, tmp_path: Path) -> None:
    mine = shutil.copytree(start, tmp_path / "model")
    config = config_of(mine, "optim.epochs=1")
    trained = trainer_of(config, tiny_data, tmp_path / "run").train()
    assert not equal(weights(trained, heads=False), weights(load_checkpoint(start).model, heads=False))
    again = trainer_of(config, tiny_data, tmp_path / "run")
    again.train()
    assert again.progress.finished
    finish_run(tmp_path / "run", tmp_path / "finished")
    (entry,) = (e for e in read_meta(start).files if e.path == "model.safetensors")
    assert read_meta(tmp_path / "finished").start_hash == entry.sha256
    tokenizer = load_checkpoint(start).tokenizer
    other = make_model(vocab_size=tokenizer.get_vocab_size(), seed=1)
    save_checkpoint(mine, other, tokenizer, config=train_config(), progress=Progress(), replace=True)
    with pytest.raises(CheckpointError, match=f"began with other weights than {mine} holds now; put those back, or use another run"):
        trainer_of(config, tiny_data, tmp_path / "run").train()


def trainer_of(config: TrainConfig, tiny_data: Any, run: Path) -> Any:
    return make_trainer(config, *tiny_data, run)


def test_a_checkpoint_of_a_start_starts_another(start: Path, tiny_data: Any, tmp_path: Path) -> None:
    """Nothing of it depends on the checkpoint that it began with."""
    mine = shutil.copytree(start, tmp_path / "first")
    trainer_of(config_of(mine, "optim.epochs=1"), tiny_data, tmp_path / "run").train()
    finish_run(tmp_path / "run", tmp_path / "second")
    shutil.rmtree(mine)
    model, _ = build(config_of(tmp_path / "second"))
    assert equal(model.state_dict(), load_checkpoint(tmp_path / "second").model.state_dict())


def test_the_command_says_what_became_of_the_heads(start: Path, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(garments), "--out", str(tmp_path / "run"), f"start={start}", "finetune=attributes", "optim.batch_size=8"]
    assert train.main([*arguments, "optim.epochs=1"]) == 0
    assert "attribute heads taken over (colour, shape, pattern, length)" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "model").meta.config.start == str(start)


def test_the_papers_vocabulary_is_another(start: Path) -> None:
    assert "drawn anew (colour, shape; there" in build(config_of(start), PAPER_VOCABULARY)[1]
