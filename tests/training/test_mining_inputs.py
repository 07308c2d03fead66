"""From a checkpoint to mined negatives in two commands: dqe-data encode, dqe-mine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_training import load_tiny, write_checkpoint

from dqe_engine.cli import mine
from dqe_engine.zones.mined_folder import read_mined
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.cli import data
from dqe_training.data.images import to_pixel_values
from dqe_training.data.triplets import TextBatcher


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def encode(*arguments: object) -> int:
    return data.main(["encode", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], said: str, *arguments: object) -> None:
    capsys.readouterr()
    assert encode(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


@pytest.mark.parametrize("storage", ["f32", "f16"])
def test_what_is_written_is_what_the_model_says(checkpoint: Path, garments: Path, tmp_path: Path, storage: str) -> None:
    out = tmp_path / "inputs"
    assert encode(checkpoint, "--data", garments, "--out", out, "--storage", storage) == 0
    triplets, pixels, _ = load_tiny(garments)
    loaded = load_checkpoint(checkpoint)
    with torch.no_grad():
        tokens = loaded.model.encode_images(to_pixel_values(pixels, loaded.model.config.preprocessing))
        targets = loaded.model.encode_targets(tokens).numpy()
        texts = TextBatcher(
            loaded.tokenizer, triplets.texts, max_length=loaded.model.config.qformer.max_text_length, captions=loaded.model.config.captions
        )
        ids, mask = texts(torch.arange(len(triplets)))
        queries = loaded.model.encode_query(tokens[torch.from_numpy(triplets.reference)], ids, mask).query.numpy()
    found = {path.stem: np.load(path) for path in out.glob("*.npy")}
    assert (found["queries"].dtype, found["gallery"].dtype) == (np.float32, np.float32 if storage == "f32" else np.float16)
    np.testing.assert_allclose(found["queries"], queries, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found["gallery"], targets, rtol=0, atol=2e-6 if storage == "f32" else 5e-4)
    np.testing.assert_array_equal(found["targets"], triplets.target)
    np.testing.assert_array_equal(found["exclude"], triplets.reference[:, None])
    assert json.loads((out / "images.json").read_text()) == list(triplets.images)


def test_many_images_are_encoded_in_batches(checkpoint: Path, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encode(checkpoint, "--data", garments, "--out", tmp_path / "once") == 0
    monkeypatch.setattr("dqe_training.encoding.ENCODE_BATCH", 7)
    monkeypatch.setattr("dqe_training.features.blocks.ENCODE_BATCH", 7)
    monkeypatch.setattr("dqe_training.mining_inputs._QUERY_BATCH", 2)
    assert encode(checkpoint, "--data", garments, "--out", tmp_path / "parts") == 0
    for name in ("queries", "gallery"):
        once, parts = (np.load(tmp_path / place / f"{name}.npy") for place in ("once", "parts"))
        np.testing.assert_allclose(once, parts, rtol=0, atol=2e-6)


def test_two_commands_from_a_checkpoint(checkpoint: Path, garments: Path, tmp_path: Path) -> None:
    assert encode(checkpoint, "--data", garments, "--out", tmp_path / "inputs") == 0
    assert mine.main([str(tmp_path / "inputs"), "--out", str(tmp_path / "mined"), "--lo", "0.1", "--hi", "0.5", "--picks", "4"]) == 0
    _, mined = read_mined(tmp_path / "mined")
    triplets, _, _ = load_tiny(garments)
    assert mined.picks.shape == (len(triplets), 4)
    found = mined.picks >= 0  # of pooled bounds: a target with little below it has fewer
    assert found.mean() > 0.8
    assert (mined.picks < len(triplets.images)).all()
    assert not (mined.picks == triplets.target[:, None]).any()
    assert not (mined.picks == triplets.reference[:, None]).any()
    assert (mined.anchor_scores[:, None] - mined.pick_scores >= mined.lo[:, None])[found].all()


def test_ones_own_triplets(checkpoint: Path, garments: Path, tmp_path: Path) -> None:
    (tmp_path / "triplets.jsonl").write_text((garments / "train.jsonl").read_text())
    assert encode(checkpoint, "--triplets", tmp_path / "triplets.jsonl", "--images", garments / "images", "--out", tmp_path / "inputs") == 0
    names = json.loads((tmp_path / "inputs" / "images.json").read_text())
    assert len(np.load(tmp_path / "inputs" / "gallery.npy")) == len(names)


def test_mistakes(checkpoint: Path, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "inputs"
    refused(capsys, "give either --data DIR", checkpoint, "--out", out)
    refused(capsys, "not a checkpoint", garments, "--data", garments, "--out", out)
    refused(capsys, "no train.jsonl here", checkpoint, "--data", tmp_path, "--out", out)
    assert not out.exists()
    assert encode(checkpoint, "--data", garments, "--out", out) == 0
    refused(
        capsys, "inputs exists already; choose another folder, or replace it with --force", checkpoint, "--data", garments, "--out", out
    )
    assert encode(checkpoint, "--data", garments, "--out", out, "--force") == 0
    refused(capsys, "it is something else and not replaced", checkpoint, "--data", garments, "--out", garments.parent, "--force")
    (tmp_path / "file").write_text("")
    refused(capsys, "cannot be written", checkpoint, "--data", garments, "--out", tmp_path / "file" / "inputs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "inputs"]
