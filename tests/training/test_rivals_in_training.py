"""SPRC's and QuRe's losses and GISTEmbed's filter in trainings: resumed to the bit, from a checkpoint, and what cannot be combined."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_training import make_trainer, model_config, train_config, write_checkpoint

from dqe_engine.errors import InputError
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.config import LossConfig, TrainConfig
from dqe_training.data.triplets import TripletData
from dqe_training.losses.margin_filter import suspected_positives
from dqe_training.model import score
from dqe_training.model.prompts import PromptTokens
from dqe_training.run.configuration import load_config

Tiny = tuple[TripletData, np.ndarray]


def config_with(loss: dict[str, Any], *, trns: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> TrainConfig:
    config = train_config(model_config(**(model or {})))
    changed = msgspec.structs.replace(config.trns, **(trns or {}))
    return msgspec.structs.replace(config, loss=LossConfig(**loss), trns=changed)


SPRC = config_with(
    {"objective": "infonce", "rank_weight": 0, "prompt_weight": 1.0, "align_weight": 1.0},
    trns={"enabled": False}, model={"base_query": "two_pass", "dropout": 0.2, "position_embeddings": 40},
)  # fmt: skip
QURE = config_with({"objective": "pairwise", "rank_weight": 1.0}, trns={"warmup": "random", "rule": "two-drops"}, model={"dropout": 0.2})
FILTERED = config_with({"objective": "infonce", "filter": "relative", "filter_margin": 0.05}, model={"dropout": 0.2})


@pytest.mark.parametrize("config", [SPRC, QURE, FILTERED], ids=["sprc", "qure", "filtered"])
def test_a_training_resumes_to_the_bit(config: TrainConfig, tiny_data: Tiny, tmp_path: Path) -> None:
    """From a checkpoint of the first epoch, before anything was mined."""
    events: list[dict[str, Any]] = []

    def watch(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "step" and event["step"] == 4:
            shutil.copytree(tmp_path / "whole" / "step-00000003", tmp_path / "resumed" / "step-00000003")

    whole = make_trainer(config, *tiny_data, tmp_path / "whole", listener=watch).train()
    resumed = make_trainer(config, *tiny_data, tmp_path / "resumed").train()
    assert [name for name, value in whole.state_dict().items() if not torch.equal(value, resumed.state_dict()[name])] == []
    newest = [load_file(tmp_path / run / "step-00000015" / "state.safetensors") for run in ("whole", "resumed")]
    assert newest[0].keys() == newest[1].keys()
    assert all(torch.equal(value, newest[1][name]) for name, value in newest[0].items())
    steps = [event for event in events if event["event"] == "step"]
    wanted = {"sprc": {"infonce", "prompt", "align"}, "qure": {"rank"}, "filtered": {"infonce", "filter/dropped"}}
    name = next(name for name, made in {"sprc": SPRC, "qure": QURE, "filtered": FILTERED}.items() if made == config)
    for event in steps:
        assert wanted[name] <= {key.removeprefix("loss/") for key in event if key.startswith("loss/")}
    if name == "sprc":
        drawn = PromptTokens(whole, seed=config.optim.seed).tokens
        assert (newest[0]["prompt_tokens"] != drawn).all()  # they train
        assert "prompt_tokens" not in whole.state_dict()
    if name == "qure":
        assert {event["epoch"] for event in events if event["event"] == "refresh"} == {1, 2}


def test_without_sprcs_losses_nothing_changes(tiny_data: Tiny, tmp_path: Path) -> None:
    """The prompts' seed is their own: a training that has them, at weights too small to matter, is the same training."""
    losses: dict[str, list[float]] = {}
    model = msgspec.structs.replace(SPRC.model, qformer=msgspec.structs.replace(SPRC.model.qformer, dropout=0.0))
    for name, weight in (("off", 0.0), ("on", 1e-30)):
        loss = msgspec.structs.replace(SPRC.loss, prompt_weight=weight, align_weight=weight)
        events: list[dict[str, Any]] = []
        config = msgspec.structs.replace(SPRC, loss=loss, model=model)
        make_trainer(config, *tiny_data, tmp_path / name, listener=events.append).train()
        losses[name] = [event["loss/infonce"] for event in events if event["event"] == "step"]
    assert losses["off"] == losses["on"]
    assert len(set(losses["on"])) > 10


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = model_config(base_query="two_pass", position_embeddings=40, attribute_weights=False)
    return write_checkpoint(tmp_path_factory.mktemp("rivals") / "model", config)


def start_config(start: Path, *overrides: str) -> TrainConfig:
    return load_config("start", [f"start={start}", "optim.batch_size=8", "optim.epochs=2", "optim.log_every=1", *overrides])


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_start_guides(chunk: int, start: Path, tiny_data: Tiny, tmp_path: Path) -> None:
    """The share that is dropped is what the start's own scores say, however far the model has moved; with LoRA, and resumed."""
    config = start_config(
        start, "finetune=lora", "loss.objective=infonce", "loss.filter=absolute", "loss.filter_margin=0.1", "loss.filter_guide=start",
        "trns.enabled=false", "optim.learning_rate=0.05", "optim.checkpoint_every=3", f"optim.cached_chunk={chunk}",
    )  # fmt: skip
    data, _ = tiny_data
    events: list[dict[str, Any]] = []
    trainer = make_trainer(config, *tiny_data, tmp_path / "run", listener=events.append)
    trainer.train()
    step, images = trainer._step, trainer._images
    made, guide = load_checkpoint(start).model, step._guide
    assert guide is not None
    steps = [event for event in events if event["event"] == "step"]
    for at in (0, len(steps) - 1):
        epoch, position = divmod(at, trainer.steps_per_epoch)
        rows = trainer._epoch_order(epoch)[position * 8 : (position + 1) * 8]
        read, _ = data.draw_texts(config.optim.seed, epoch)
        ids, mask = step._texts(torch.from_numpy(read[rows]))
        with torch.no_grad():
            scores = score(made.encode_query(images(data.reference[rows]), ids, mask).query, made.encode_targets(images(data.target[rows])))
        dropped = suspected_positives(scores, strategy="absolute", margin=0.1).numpy()
        others = data.target[rows][:, None] != data.target[rows][None]
        assert steps[at]["loss/filter/dropped"] == pytest.approx((dropped & others).sum() / others.sum(), abs=1e-5)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in guide.state_dict().items())
    assert any(not torch.equal(value, made.state_dict()[name]) for name, value in trainer.model.state_dict().items())
    shutil.rmtree(tmp_path / "run" / "step-00000010")
    again = make_trainer(config, *tiny_data, tmp_path / "run").train()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trainer.model.state_dict().items())


def test_a_temperature_may_be_learned_from_a_start_on(start: Path, tiny_data: Tiny, tmp_path: Path) -> None:
    config = start_config(start, "model.learned_temperature=true", "loss.objective=infonce", "loss.prompt_weight=1", "loss.align_weight=1")
    model = make_trainer(config, *tiny_data, tmp_path / "run").train()
    assert model.temperature(0.07) != 0.07
    assert model.config.base_query == "two_pass"
    onward = write_checkpoint(tmp_path / "learned", msgspec.structs.replace(model_config(), learned_temperature=True))
    assert not load_config("start", [f"start={onward}", "model.learned_temperature=false"]).model.learned_temperature
    fixed = load_config("start", [f"start={onward}", "model.learned_temperature=false", "optim.batch_size=8", "optim.epochs=1"])
    assert make_trainer(fixed, *tiny_data, tmp_path / "fixed").model.temperature(0.07) == 0.07


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.objective=pairwise", "trns.enabled=false"], "loss.objective pairwise needs a negative at every step"),
        (["loss.objective=pairwise"], "set trns.enabled to true, and trns.warmup to random"),
        (["loss.objective=pairwise", "loss.rank_weight=0", "trns.warmup=random"], "rank_weight must be above 0"),
        (["loss.objective=pairwise", "loss.filter=absolute", "trns.warmup=random"], "no in-batch negatives, so filter must be off"),
        (["trns.warmup=random", "trns.warmup_epochs=0"], "warmup is random, but there is none"),
        (["trns.warmup=random", "trns.enabled=false"], "warmup is random, but there is none"),
        (["loss.filter_margin=0.1"], "filter_margin and filter_guide are set, but filter is off"),
        (["loss.filter=absolute", "loss.filter_margin=-1"], "filter_margin must be at least 0"),
        (["loss.filter=relative", "loss.filter_margin=1.5"], "a share, so at most 1"),
        (["loss.filter=absolute", "loss.filter_guide=start"], "so set start, and optim.vision_learning_rate to 0"),
        (["loss.prompt_weight=1"], "8 tokens into a text of 32, but there are 32 positions; set model.qformer.position_embeddings to 40"),
        (["loss.align_weight=-1"], "align_weight must be at least 0"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("garments", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_alone_take_no_prompts(start: Path) -> None:
    with pytest.raises(InputError, match=r"keeps the encoder as it is, so loss\.prompt_weight"):
        load_config("start", [f"start={start}", "finetune=attributes", "loss.prompt_weight=1"])
