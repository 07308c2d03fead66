"""Checkpoints: what was saved comes back, damage is told, and there is nothing to unpickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.full_disk import files_of_at_most
from support.tiny_training import flip_byte, make_model, train_config

from dqe_engine.errors import CheckpointError
from dqe_training.checkpointing.checkpoint import (
    Progress,
    clean_run,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    optimizer_tensors,
    prune_checkpoints,
    read_meta,
    restore_optimizer,
    save_checkpoint,
)
from dqe_training.checkpointing.meta import SCHEMA_VERSION
from dqe_training.tokenizer import build_tokenizer

FILES = ("checkpoint.json", "model.safetensors", "tokenizer.json", "vocabulary.json", "state.safetensors")


def write(path: Path, *, seed: int = 0, step: int = 3, replace: bool = False) -> Path:
    tokenizer = build_tokenizer(["is red", "make it a dress"])
    model = make_model(vocab_size=tokenizer.get_vocab_size(), seed=seed)
    state = {"bank": torch.arange(3.0)}
    save_checkpoint(
        path, model, tokenizer, config=train_config(), progress=Progress(step=step), data_hash="d" * 32, state=state, replace=replace
    )
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoints") / "step-00000003")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / original.name)


def test_round_trip(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    tokenizer = build_tokenizer(["is red", "make it a dress"])
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.model.training is False
    assert loaded.meta.config == train_config()
    assert loaded.meta.progress == Progress(step=3)
    assert loaded.vocabulary == model.vocabulary
    assert loaded.tokenizer.encode("is red").ids == tokenizer.encode("is red").ids
    assert torch.equal(load_state(checkpoint)["bank"], torch.arange(3.0))


def test_there_is_no_pickle(checkpoint: Path) -> None:
    assert {path.name for path in checkpoint.iterdir()} == set(FILES)
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:  # safetensors: a length, a JSON header, raw numbers
            length = int.from_bytes(content[:8], "little")
            json.loads(content[8 : 8 + length])
        assert not content.startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"))


def one_line(caught: pytest.ExceptionInfo[CheckpointError], *said: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("name", [name for name in FILES if name != "checkpoint.json"])
@pytest.mark.parametrize("position", [0, -1])
def test_a_changed_byte_is_found(checkpoint: Path, name: str, position: int) -> None:
    flip_byte(checkpoint / name, position)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    one_line(caught, name, "damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    one_line(caught, name)


@pytest.mark.parametrize("name", FILES)
def test_a_shorter_or_longer_file_is_found(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    for changed in (content[:-5], content + b"}", b""):
        (checkpoint / name).write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(checkpoint)
        one_line(caught, name)


def test_any_changed_byte_of_the_record_is_an_error_or_harmless(checkpoint: Path) -> None:
    """The record itself has no hash: a changed byte must never end in a traceback, nor in other weights."""
    expected = load_checkpoint(checkpoint).model.state_dict()
    content = (checkpoint / "checkpoint.json").read_bytes()
    rng = np.random.default_rng(0)
    errors = 0
    for position, bit in zip(rng.integers(0, len(content), 150), rng.integers(0, 8, 150), strict=True):
        changed = bytearray(content)
        changed[position] ^= 1 << int(bit)
        (checkpoint / "checkpoint.json").write_bytes(bytes(changed))
        try:
            loaded = load_checkpoint(checkpoint).model.state_dict()
        except CheckpointError:
            errors += 1
        else:
            assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert errors > 75


def edited(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_schema_says_upgrade(checkpoint: Path) -> None:
    edited(checkpoint, schema_version=SCHEMA_VERSION + 1, something_new={"a": 1})
    with pytest.raises(CheckpointError) as caught:
        read_meta(checkpoint)
    one_line(caught, f"schema version {SCHEMA_VERSION + 1}", "upgrade")


def test_the_first_schema_is_read(checkpoint: Path) -> None:
    """As it was written before backbones: without their keys."""
    config = json.loads((checkpoint / "checkpoint.json").read_text())["config"]
    for name in ("backbone", "finetune", "lora", "start"):
        del config[name]
    for name in ("vision_precision", "heads_learning_rate"):
        del config["optim"][name]
    for section in ("vision", "qformer"):
        for name in ("mlp_size", "layer_norm_eps", "activation"):
            del config["model"][section][name]
    del config["model"]["vision"]["qkv_bias"], config["model"]["qformer"]["vocab_size"], config["model"]["qformer"]["position_embeddings"]
    expected = load_checkpoint(checkpoint)
    edited(checkpoint, schema_version=1, config=config)
    loaded = load_checkpoint(checkpoint)
    assert loaded.meta.config == expected.meta.config
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in expected.model.state_dict().items())


def test_the_second_schema_is_read(checkpoint: Path) -> None:
    """As it was written before a training could start with a checkpoint."""
    expected, path = read_meta(checkpoint), checkpoint / "checkpoint.json"
    content = json.loads(path.read_text()) | {"schema_version": 2}
    del content["config"]["start"], content["start_hash"]
    path.write_text(json.dumps(content))
    assert read_meta(checkpoint) == msgspec.structs.replace(expected, schema_version=2)


def test_the_third_schema_is_read(checkpoint: Path) -> None:
    """As it was written when zones by rank were called "quantile", and without validation: what was trained then is still there to be
    used."""
    expected, path = read_meta(checkpoint), checkpoint / "checkpoint.json"
    content = json.loads(path.read_text())
    content["config"]["trns"]["zones"]["bounds"] = "quantile"
    del content["progress"]["validated"], content["progress"]["best"]
    path.write_text(json.dumps(content | {"schema_version": 3}))
    zones = msgspec.structs.replace(expected.config.trns.zones, bounds="rank")
    assert read_meta(checkpoint).config.trns == msgspec.structs.replace(expected.config.trns, zones=zones)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'quantile' .*'pooled'"):
        read_meta(checkpoint)


def test_the_fourth_schema_is_read(checkpoint: Path) -> None:
    """As it was written before `kind`."""
    expected, path = read_meta(checkpoint), checkpoint / "checkpoint.json"
    content = json.loads(path.read_text()) | {"schema_version": 4}
    assert content.pop("kind") == "training-checkpoint"
    path.write_text(json.dumps(content))
    assert read_meta(checkpoint) == msgspec.structs.replace(expected, schema_version=4)


def test_an_unlisted_file_is_not_trusted(checkpoint: Path) -> None:
    edited(checkpoint, files=[f for f in json.loads((checkpoint / "checkpoint.json").read_text())["files"] if "model" not in f["path"]])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not in the list"):
        load_checkpoint(checkpoint)


def test_weights_that_do_not_fit_the_configuration(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "checkpoint.json").read_text())["config"]
    config["model"]["qformer"]["embedding_dim"] = 12
    edited(checkpoint, config=config)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    one_line(caught, "does not fit the configuration")


@pytest.mark.parametrize("path", ["missing", "."])
def test_not_a_checkpoint(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / path)


def test_saving_over_another_needs_replace(checkpoint: Path) -> None:
    before = {f.name: f.read_bytes() for f in checkpoint.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        write(checkpoint, seed=1)
    assert {f.name: f.read_bytes() for f in checkpoint.iterdir()} == before
    write(checkpoint, seed=1, replace=True)
    assert (checkpoint / "model.safetensors").read_bytes() != before["model.safetensors"]
    load_checkpoint(checkpoint)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path / "file" / "step-00000001")
    one_line(caught, "cannot be written")


def test_no_space_left_is_one_line_and_loses_nothing(checkpoint: Path) -> None:
    before = {f.name: f.read_bytes() for f in checkpoint.iterdir()}
    with files_of_at_most(20_000), pytest.raises(CheckpointError) as caught:
        write(checkpoint, replace=True)
    one_line(caught, "cannot be written")
    assert {f.name: f.read_bytes() for f in checkpoint.iterdir()} == before
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


# -- runs ----------------------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (3, 6, 12):
        write(tmp_path / f"step-{step:08d}", step=step)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000012"
    flip_byte(tmp_path / "step-00000012" / "model.safetensors")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000006"
    for step in (3, 6):
        (tmp_path / f"step-{step:08d}" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000012"):
        latest_checkpoint(tmp_path)


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "model").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "step-00000010", "step-00000100"]


def test_what_is_pruned_goes_at_once(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while files are being removed must not leave part of a checkpoint under its name."""
    for step in (1, 2, 3):
        shutil.copytree(original, tmp_path / f"step-{step:08d}")
    seen: list[bool] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: seen.append((tmp_path / "step-00000001").exists()))
    prune_checkpoints(tmp_path)
    assert seen == [False]
    monkeypatch.undo()
    clean_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_replacement_that_never_landed_is_undone(tmp_path: Path, original: Path) -> None:
    """What a kill between the two renames of a replacement leaves: the old one moved aside, the new one unnamed."""
    aside, new = tmp_path / ".tmp-step-00000003.abcdefgh", tmp_path / ".tmp-step-00000003.ijklmnop"
    shutil.copytree(original, aside / "old")
    new.mkdir()
    (tmp_path / ".tmp-other.txt").write_text("not a checkpoint")
    clean_run(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-other.txt", "step-00000003"]


def test_optimiser_state_survives() -> None:
    def run(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            sum((p**2).sum() for p in parameters).backward()
            optimizer.step()

    def make() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(torch.arange(1.0, 4.0)), torch.nn.Parameter(torch.ones(2, 2))]
        return parameters, torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)

    straight, optimizer = make()
    run(optimizer, straight, 3)
    state = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    resumed, again = make()
    with torch.no_grad():
        for mine, other in zip(resumed, straight, strict=True):
            mine.copy_(other)
    restore_optimizer(again, state | {"bank": torch.zeros(1)})
    run(optimizer, straight, 2)
    run(again, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_nothing_but_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"holds files but no checkpoint\.json"):
        write(photos, replace=True)
    assert [path.name for path in photos.iterdir()] == ["holiday.jpg"]
