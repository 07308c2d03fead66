"""BLIP-2 checkpoints that are damaged, pickled, of other sizes or nowhere: each is one line that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.refused import refused as refused_as
from support.tiny_blip2 import config_of, model_of
from transformers import Blip2ForImageTextRetrieval as Upstream

from dqe_engine.errors import CheckpointError, InputError
from dqe_training.backbone import find_backbone
from dqe_training.backbone.weights import INDEX
from dqe_training.run.configuration import load_config
from dqe_training.run.workflow import make_tokenizer

refused = partial(refused_as, kind=CheckpointError)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `section__key` reaches into a section."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = data
        for section in sections:
            place = place[section]
        place[last] = value
    path.write_text(json.dumps(data))


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply `change` to the weights of a copy, as one file."""
    weights = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
    change(weights)
    for file in (*directory.glob("*.safetensors"), directory / INDEX):
        file.unlink()
    save_file(weights, directory / "model.safetensors")


def test_a_key_that_is_missing_unknown_or_misshapen_is_named(copy: Path) -> None:
    key = "qformer.encoder.layer.2.crossattention.attention.key.weight"
    original = {p.name: p.read_bytes() for p in copy.iterdir()}

    def restored(change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        (copy / "model.safetensors").unlink(missing_ok=True)
        for name, content in original.items():
            (copy / name).write_bytes(content)
        rewritten(copy, change)
        return copy

    def drop(w: dict[str, torch.Tensor]) -> None:
        del w[key]

    def misshape(w: dict[str, torch.Tensor]) -> None:
        w[key] = w[key][:, :-1].contiguous()

    def add(w: dict[str, torch.Tensor]) -> None:
        w["language_model.decoder.weight"] = torch.zeros(2)

    def ours(w: dict[str, torch.Tensor]) -> None:
        w["attribute_heads.gain"] = torch.zeros(2)

    refused(lambda: model_of(restored(drop)), "1 weights are missing, the first is " + key)
    refused(lambda: model_of(restored(misshape)), f"{key} has shape (16, 23), the configuration wants (16, 24)")
    refused(lambda: model_of(restored(add)), "unknown weight language_model.decoder.weight")
    refused(lambda: model_of(restored(ours)), "attribute_heads.gain")


def test_damaged_files(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (whole[:-7], whole[:4], b"", b"\xff" * 64):
        shard.write_bytes(content)
        refused(lambda: model_of(copy), shard.name, "damaged or truncated")
    shard.unlink()
    refused(lambda: model_of(copy), shard.name, "missing")
    (copy / INDEX).write_text("{")
    refused(lambda: model_of(copy), INDEX, "damaged")
    (copy / INDEX).write_text(json.dumps({"weight_map": {"query_tokens": "../elsewhere.safetensors"}}))
    refused(lambda: model_of(copy), INDEX, "other folders")


def test_a_shard_that_is_there_twice(copy: Path) -> None:
    shards = sorted(copy.glob("*.safetensors"))
    index = json.loads((copy / INDEX).read_text())
    shutil.copy(shards[0], copy / "again.safetensors")
    index["weight_map"]["extra"] = "again.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    refused(lambda: model_of(copy), "is there twice")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused_with_the_way_out(copy: Path, name: str) -> None:
    for file in (*copy.glob("*.safetensors"), copy / INDEX):
        file.unlink()
    refused(lambda: model_of(copy), "no model.safetensors")
    (copy / name).write_bytes(b"\x80\x02}q\x00.")
    refused(lambda: model_of(copy), name, "pickle", "save_pretrained")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["Blip2ForConditionalGeneration"]}, "holds Blip2ForConditionalGeneration, expected Blip2ForImageTextRetrieval"),
        ({"qformer_config__use_qformer_text_input": False}, "reads no text"),
        ({"vision_config__hidden_act": "silu"}, "vision_config.hidden_act is 'silu'"),
        ({"vision_config__image_size": [16, 24]}, "only squares"),
        ({"vision_config__image_size": 32}, "takes squares of 32 px"),
        ({"vision_config__num_hidden_layers": "two"}, "vision_config.num_hidden_layers"),
        ({"vision_config__num_attention_heads": 7}, "multiple of heads"),
        ({"qformer_config__hidden_dropout_prob": 0.3}, "0.3 and 0.1"),
    ],
)
def test_a_configuration_that_cannot_be_described(copy: Path, changes: dict[str, Any], said: str) -> None:
    edit(copy / "config.json", **changes)
    refused(lambda: config_of(copy), "config.json", said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"height": 16, "width": 20}}, "takes squares of 16 px"),
        ({"size": {"shortest_edge": 16}}, "takes squares of 16 px"),
        ({"do_center_crop": True}, "without a crop"),
        ({"do_normalize": False}, "normalised"),
        ({"rescale_factor": 0.5}, "1/255"),
        ({"resample": 0}, "resample is 0"),
        ({"image_mean": [0.5]}, "three values"),
        ({"image_std": [0.0, 1.0, 1.0]}, "std must be positive"),
        ({"size": "large"}, "size"),
    ],
)
def test_a_preprocessing_that_cannot_be_described(copy: Path, changes: dict[str, Any], said: str) -> None:
    edit(copy / "preprocessor_config.json", **changes)
    refused(lambda: config_of(copy), said)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_or_broken_description(copy: Path, name: str) -> None:
    def use() -> None:
        make_tokenizer(config_of(copy), [])

    for content in (b"{", b"\xff\xfe", b"[]", b""):
        (copy / name).write_bytes(content)
        refused(use, name)
    (copy / name).unlink()
    refused(use, name, "missing")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"post_processor": None}, "expected it between [CLS] and [SEP]"),
        ({"model__vocab__extra": 5_000}, "'extra' has id 5000"),
        ({"model__vocab__[PAD]": 3, "added_tokens": []}, "[PAD] has id 3"),
    ],
)
def test_a_tokenizer_of_another_model(copy: Path, changes: dict[str, Any], said: str) -> None:
    edit(copy / "tokenizer.json", **changes)
    refused(lambda: make_tokenizer(config_of(copy), []), said)


def test_weights_that_the_overridden_sizes_do_not_fit(published: tuple[Path, Upstream]) -> None:
    refused(lambda: model_of(published[0], "model.vision.layers=3"), "weights are missing, the first is vision_model.encoder.layers.2")
    refused(lambda: model_of(published[0], "model.vision.layers=1"), "unknown weight vision_model.encoder.layers.1")
    refused(lambda: model_of(published[0], "model.qformer.embedding_dim=12"), "the configuration wants")


def test_two_sources_for_one_tower(published: tuple[Path, Upstream]) -> None:
    refused(lambda: config_of(published[0], "vision_weights=garments"), "vision_weights must be empty", kind=InputError)
    refused(lambda: load_config("blip2"), "backbone=owner/name", kind=InputError)


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused(lambda: find_backbone("no/such/place"), "no such directory", kind=InputError)
    refused(lambda: find_backbone(str(tmp_path / "missing")), "no such directory", kind=InputError)
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, str | None]] = []

    def offline(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(pattern.endswith((".bin", ".pth", "*")) for pattern in allow_patterns)
        raise LocalEntryNotFoundError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused(
        lambda: find_backbone("Salesforce/blip2-itm-vit-g"), "Salesforce/blip2-itm-vit-g", "Name or service not known", "give its directory"
    )
    refused(lambda: find_backbone("Salesforce/blip2-itm-vit-g@refs/pr/3"), "cannot be fetched")
    assert asked == [("Salesforce/blip2-itm-vit-g", None), ("Salesforce/blip2-itm-vit-g", "refs/pr/3")]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    assert find_backbone("Salesforce/blip2-itm-vit-g") == tmp_path
