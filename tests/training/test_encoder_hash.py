"""The identity of an encoder: of values, not of the precision or place that holds them, and of every one of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_training import heads_alone, make_model, train_config, write_checkpoint

from dqe_training.checkpointing.checkpoint import Progress, load_checkpoint, save_checkpoint
from dqe_training.checkpointing.encoder_hash import encoder_hash
from dqe_training.config import LoRAConfig, TrainConfig
from dqe_training.model import DQEModel
from dqe_training.model.adapters import merge_adapters, prepare_finetuning
from dqe_training.tokenizer import build_tokenizer

NAMES = [name for name in make_model().state_dict() if not name.startswith("attribute_heads.")]


def test_a_checkpoint_has_the_hash_of_its_model(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    loaded = load_checkpoint(directory)
    assert len({encoder_hash(directory), encoder_hash(loaded), encoder_hash(loaded.model)}) == 1
    assert len(encoder_hash(directory)) == 64


def test_it_is_what_the_docstring_says() -> None:
    """Written out, since bundles keep it: another definition would make every stored hash a stranger."""
    model = make_model()
    content = b""
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("attribute_heads."):
            content += f"{name} [{', '.join(str(d) for d in value.shape)}]\n".encode() + value.numpy().astype("<f4").tobytes()
    assert encoder_hash(model) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_does_not_matter_rounding_does(dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["is red"])
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    original = encoder_hash(model)
    model.vision_model.to(dtype)
    save_checkpoint(tmp_path / "half", model, tokenizer, config=train_config(), progress=Progress())
    stored = load_file(tmp_path / "half" / "model.safetensors")["vision_model.post_layernorm.weight"]
    assert stored.dtype == dtype
    wide, as_stored = load_checkpoint(tmp_path / "half"), load_checkpoint(tmp_path / "half", as_stored=True)
    assert wide.model.vision_model.dtype == torch.float32
    assert len({encoder_hash(s) for s in (tmp_path / "half", wide, as_stored, model)}) == 1
    save_checkpoint(tmp_path / "wide", wide.model, tokenizer, config=train_config(), progress=Progress())
    assert encoder_hash(tmp_path / "wide") == encoder_hash(model) != original


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_counts(name: str) -> None:
    model = make_model()
    before = encoder_hash(model)
    with torch.no_grad():
        value = model.state_dict()[name].view(-1)
        value[-1] = torch.nextafter(value[-1], torch.tensor(9.0))
    assert encoder_hash(model) != before


def test_names_and_shapes_count(tmp_path: Path) -> None:
    hashes = set()
    for at, content in enumerate(({"a": torch.zeros(4)}, {"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.zeros(2)})):
        directory = tmp_path / str(at)
        directory.mkdir()
        save_file(content, directory / "model.safetensors")
        hashes.add(encoder_hash(directory))
    assert len(hashes) == 4


def test_heads_do_not() -> None:
    model = make_model()
    before = encoder_hash(model)
    with torch.no_grad():
        for parameter in model.attribute_heads.parameters():
            parameter.normal_()
    assert encoder_hash(model) == before
    prepare_finetuning(model, heads_alone())
    assert encoder_hash(model.train()) == before


def test_adapters_count_as_merged() -> None:
    model = lora_model()
    before = encoder_hash(model)
    assert before != encoder_hash(make_model())
    merge_adapters(model)
    assert encoder_hash(model) == before


def lora_model() -> DQEModel:
    model = make_model()
    prepare_finetuning(model, TrainConfig(model=model.config, finetune="lora", lora=LoRAConfig(rank=2)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    return model
