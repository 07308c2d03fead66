"""What trains: everything, adapters, heads or the attribute heads alone; adapters are merged for whoever loads a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.rank_workers import batch_gradients, largest_difference
from support.tiny_blip2 import write_blip2
from support.tiny_training import heads_alone, make_model, make_trainer, model_config, query_inputs, train_config, write_checkpoint

from dqe_engine.errors import InputError
from dqe_training.checkpointing.checkpoint import latest_checkpoint, load_checkpoint
from dqe_training.checkpointing.encoder_hash import encoder_hash
from dqe_training.config import LoRAConfig, TrainConfig
from dqe_training.data.triplets import TripletData
from dqe_training.distributed import World
from dqe_training.model import DQEModel
from dqe_training.model.adapters import adapter_state, has_adapters, merge_adapters, plain_state, prepare_finetuning, restore
from dqe_training.run.configuration import load_config
from dqe_training.run.trainer import finish_run
from dqe_training.run.workflow import DataSource, build_model, train_run

Tiny = tuple[TripletData, np.ndarray]


def finetuned(mode: str, model: Any = None, *, lora: LoRAConfig | None = None, **optim: Any) -> TrainConfig:
    return msgspec.structs.replace(train_config(model, **optim), finetune=mode, lora=lora or LoRAConfig(rank=2, alpha=4.0, dropout=0.1))


def trainable(config: TrainConfig) -> set[str]:
    model = make_model(config.model)
    prepare_finetuning(model, config)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_what_each_mode_trains() -> None:
    heads = trainable(finetuned("heads"))
    assert roots(heads) == {"attribute_heads", "vision_projection", "text_projection"}
    lora = trainable(finetuned("lora"))
    assert lora > heads
    assert all(".lora_" in name for name in lora - heads)
    assert roots(lora - heads) == {"qformer"}
    attributes = trainable(heads_alone())
    assert attributes == {f"attribute_heads.{name}" for name, _ in make_model().attribute_heads.named_parameters()}
    full = trainable(finetuned("full"))
    assert roots(full) == {*roots(heads), "qformer", "embeddings", "query_tokens"}
    assert roots(trainable(finetuned("full", vision_learning_rate=1e-3))) == {*roots(full), "vision_model"}


def test_adapters_go_where_they_are_asked_for() -> None:
    names = trainable(finetuned("lora", lora=LoRAConfig(rank=2, targets=("query",))))
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    assert adapted == {"query"}
    with pytest.raises(InputError, match=r"lora\.targets q_proj: no such linear layer in the Q-Former; it has dense, key, query, value"):
        trainable(finetuned("lora", lora=LoRAConfig(targets=("q_proj",))))


def perturbed(seed: int = 0) -> Any:
    """A model whose adapters are not zero."""
    config = finetuned("lora", lora=LoRAConfig(rank=2, alpha=4.0))
    model = make_model(config.model)
    prepare_finetuning(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def test_merged_weights_compute_the_same() -> None:
    model, plain = perturbed(), make_model()
    untouched = {name: value.clone() for name, value in plain.state_dict().items()}
    inputs = query_inputs(model, 4, 6)
    with torch.inference_mode():
        expected = model.encode_query(*inputs)
        before = plain.encode_query(*inputs)
    plain.load_state_dict(plain_state(model))
    with torch.inference_mode():
        for name, a, b in zip(expected._fields, plain.encode_query(*inputs), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)
    assert (before.query - expected.query).abs().max() > 0.01  # the adapters do something
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, untouched[name])}
    assert changed
    assert all(name.startswith("qformer.") and name.endswith(".weight") for name in changed)
    merge_adapters(model)
    assert not has_adapters(model)
    assert model.state_dict().keys() == untouched.keys()
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_query(*inputs).query, expected.query, rtol=0, atol=1e-5)
    merge_adapters(model)  # once more: nothing left to do


def test_state_comes_back_to_the_bit() -> None:
    model, other = perturbed(), perturbed(1)
    restore(other, plain_state(model), adapter_state(model))
    expected = model.state_dict()
    assert [name for name, value in other.state_dict().items() if not torch.equal(value, expected[name])] == []
    assert adapter_state(make_model()) == {}


# -- training --------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "lora": finetuned("lora", model_config(dropout=0.1)),
    "heads": finetuned("heads"),
    "rates": finetuned("lora", heads_learning_rate=1e-2),
}


class StopError(Exception):
    pass


def stop_at(step: int) -> Any:
    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise StopError

    return listen


@pytest.mark.parametrize("name", CONFIGS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name: str, tiny_data: Tiny, tmp_path: Path) -> None:
    config = CONFIGS[name]
    start = make_trainer(config, *tiny_data, tmp_path / "unused").model
    initial = {key: value.clone() for key, value in plain_state(start).items()}
    straight = make_trainer(config, *tiny_data, tmp_path / "straight").train()
    assert not has_adapters(straight)
    with pytest.raises(StopError):
        make_trainer(config, *tiny_data, tmp_path / "stopped", listener=stop_at(8)).train()
    torch.manual_seed(99)
    resumed = make_trainer(config, *tiny_data, tmp_path / "stopped").train()
    expected = straight.state_dict()
    assert [key for key, value in resumed.state_dict().items() if not torch.equal(value, expected[key])] == []
    changed = roots({key for key, value in expected.items() if not torch.equal(value, initial[key])})
    assert changed == {"attribute_heads", "vision_projection", "text_projection"} | ({"qformer"} if name != "heads" else set())


def test_a_checkpoint_shows_no_adapters(tiny_data: Tiny, tmp_path: Path) -> None:
    trained = make_trainer(CONFIGS["lora"], *tiny_data, tmp_path / "run").train()
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    finish_run(tmp_path / "run", tmp_path / "model")
    expected = trained.state_dict()
    for directory in (newest, tmp_path / "model"):
        loaded = load_checkpoint(directory).model
        assert not has_adapters(loaded)
        assert [key for key, value in loaded.state_dict().items() if not torch.equal(value, expected[key])] == []
    assert not (tmp_path / "model" / "state.safetensors").exists()


def test_the_heads_have_their_own_rate(tiny_data: Tiny, tmp_path: Path) -> None:
    optimizer = make_trainer(CONFIGS["rates"], *tiny_data, tmp_path).optimizer
    assert {group["peak"] for group in optimizer.param_groups} == {1e-2, 1e-3}
    count = sum(p.numel() for group in optimizer.param_groups if group["peak"] == 1e-2 for p in group["params"])
    assert count == sum(p.numel() for p in make_model().attribute_heads.parameters())


def test_a_backbone_is_fine_tuned_with_a_half_precision_tower(garments: Path, tmp_path: Path) -> None:
    write_blip2(tmp_path / "blip2")
    overrides = [f"backbone={tmp_path / 'blip2'}", "optim.epochs=2", "optim.batch_size=8", "optim.learning_rate=1e-3", "finetune=lora"]
    config = load_config("blip2", [*overrides, "optim.vision_precision=float16"])
    trainer = train_run(config, DataSource.from_directory(garments), tmp_path / "run")
    finish_run(tmp_path / "run", tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for name, value in stored.items() if name.startswith("vision_model.")} == {torch.float16}
    loaded, start = load_checkpoint(tmp_path / "model"), build_model(config, trainer.model.vocabulary, 0)
    vision = start.vision_model.state_dict()
    assert {value.dtype for value in vision.values()} == {torch.float16}
    assert all(torch.equal(value, vision[name].float()) for name, value in loaded.model.vision_model.state_dict().items())
    assert not torch.equal(loaded.model.text_projection.weight, start.text_projection.weight)
    assert loaded.tokenizer.token_to_id("[DEC]") == config.model.qformer.vocab_size - 1


# -- the attribute heads alone ---------------------------------------------------------------------------------------------


def tensor_bytes(directory: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize("stop", [0, 4, 8])  # before and after the first refresh
def test_the_encoder_keeps_every_bit(stop: int, tiny_data: Tiny, tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "start", model_config(dropout=0.1))
    config = heads_alone(model_config(dropout=0.1), start=str(start))
    if stop:
        with pytest.raises(StopError):
            make_trainer(config, *tiny_data, tmp_path / "run", listener=stop_at(stop)).train()
        torch.manual_seed(99)
    make_trainer(config, *tiny_data, tmp_path / "run").train()
    finish_run(tmp_path / "run", tmp_path / "model")
    before, after = tensor_bytes(start), tensor_bytes(tmp_path / "model")
    assert before.keys() == after.keys()
    assert roots({name for name in before if before[name] != after[name]}) == {"attribute_heads"}
    assert encoder_hash(tmp_path / "model") == encoder_hash(start)
    if stop:
        straight = make_trainer(config, *tiny_data, tmp_path / "straight").train().state_dict()
        assert {name: value.numpy().tobytes() for name, value in straight.items()} == after


def test_the_heads_have_the_gradients_of_a_full_training(garments: Path) -> None:
    full = batch_gradients(str(garments), train_config(), negatives=True, world=World())
    alone = batch_gradients(str(garments), heads_alone(), negatives=True, world=World())
    kept = {name for name in full if name.startswith(("attribute_heads.", "loss.", "queries"))}
    assert {name.partition(".")[0] for name in full.keys() - kept} == {"qformer", "embeddings", *FROZEN}
    assert largest_difference(alone, {name: full[name] for name in kept}) <= 5e-6


FROZEN = ("query_tokens", "vision_projection", "text_projection")


def test_nothing_frozen_has_a_backward_pass(tiny_data: Tiny) -> None:
    """Neither a graph through the Q-Former nor, for targets, a forward pass in every step."""
    model = make_model()
    prepare_finetuning(model, heads_alone())
    output = model.encode_query(*query_inputs(model, 4, 6))
    assert not output.base_query.requires_grad
    leaves, seen, left = set(), set(), [output.query.sum().grad_fn, output.presence.sum().grad_fn]
    while left:
        if (node := left.pop()) is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        left += [following for following, _ in node.next_functions]
    assert leaves == {id(parameter) for parameter in model.attribute_heads.parameters()}


def test_targets_of_a_frozen_encoder_are_encoded_once(tiny_data: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    encode = DQEModel.encode_targets

    def counting(self: DQEModel, image_tokens: torch.Tensor) -> torch.Tensor:
        rows.append(len(image_tokens))
        return encode(self, image_tokens)

    monkeypatch.setattr(DQEModel, "encode_targets", counting)
    trainer = make_trainer(heads_alone(start=str(write_checkpoint(tmp_path / "start"))), *tiny_data, tmp_path / "run")
    trainer.train()
    assert trainer.negatives.mined is not None
    assert sum(rows) == len(tiny_data[0].images)


def test_the_rate_that_is_logged_is_one_that_trains(tiny_data: Tiny, tmp_path: Path) -> None:
    config = heads_alone(start=str(write_checkpoint(tmp_path / "start")), heads_learning_rate=1e-2, warmup_share=0.0, epochs=1)
    events: list[dict[str, Any]] = []
    trainer = make_trainer(config, *tiny_data, tmp_path / "run", listener=events.append)
    trainer.train()
    assert {group["peak"] for group in trainer.optimizer.param_groups} == {1e-2}
    assert next(e for e in events if e["event"] == "step")["learning_rate"] == pytest.approx(1e-2)
