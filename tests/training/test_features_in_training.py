"""Training, mining and evaluation with a feature cache: the same numbers as without, and the commands that fill one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_blip2 import write_blip2
from support.tiny_training import OVERRIDES, make_model, model_config, train_config, write_checkpoint

from dqe_engine.errors import CheckpointError, InputError
from dqe_training.cli import data, evaluate, train
from dqe_training.features.store import row_bytes
from dqe_training.run import workflow
from dqe_training.run.workflow import DataSource, train_run

Event = dict[str, Any]


def losses(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("triplets_per_second", "seconds")} for e in lines]


def no_pixels(*args: Any, **options: Any) -> None:
    raise AssertionError("pixels of all images were loaded")


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    state = b.state_dict()
    return all(torch.equal(value, state[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("autocast", ["off", "bf16"])
def test_training_is_the_same_to_the_bit(autocast: str, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, source = train_config(model_config(dropout=0.1), autocast=autocast), DataSource.from_directory(garments)
    plain = train_run(config, source, tmp_path / "plain")
    monkeypatch.setattr(workflow, "load_pixels", no_pixels)
    cached = train_run(config, source, tmp_path / "cached", features=tmp_path / "cache")
    again = train_run(config, source, tmp_path / "again", features=tmp_path / "cache")
    assert losses(tmp_path / "plain") == losses(tmp_path / "cached") == losses(tmp_path / "again")
    assert same_state(plain.model, cached.model)
    assert same_state(plain.model, again.model)
    assert plain.serving_zones == cached.serving_zones


class StopError(Exception):
    pass


def test_a_run_may_go_on_with_a_cache_and_without(garments: Path, tmp_path: Path) -> None:
    config, source = train_config(), DataSource.from_directory(garments)
    straight = train_run(config, source, tmp_path / "straight")

    def stop(event: Event) -> None:
        if event["event"] == "step" and event["step"] in (4, 10):
            raise StopError

    with pytest.raises(StopError):
        train_run(config, source, tmp_path / "run", listener=stop)
    with pytest.raises(StopError):
        train_run(config, source, tmp_path / "run", listener=lambda e: stop(e) if e.get("step") != 4 else None, features=tmp_path / "cache")
    resumed = train_run(config, source, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert same_state(resumed.model, straight.model)


def test_a_backbone_that_changed_is_not_resumed_with_features_of_the_new_one(garments: Path, tmp_path: Path) -> None:
    write_blip2(tmp_path / "blip2")
    config = workflow.load_config("blip2", [f"backbone={tmp_path / 'blip2'}", "optim.epochs=1", "optim.batch_size=8"])
    source = DataSource.from_directory(garments)
    train_run(config, source, tmp_path / "run", features=tmp_path / "cache")
    write_blip2(tmp_path / "blip2", seed=1)
    with pytest.raises(CheckpointError, match="its vision tower is not the one that made the image tokens"):
        train_run(config, source, tmp_path / "run", features=tmp_path / "cache")


def test_a_tower_that_trains_has_no_cache(garments: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a feature cache needs a frozen tower"):
        train_run(
            train_config(vision_learning_rate=1e-3), DataSource.from_directory(garments), tmp_path / "run", features=tmp_path / "cache"
        )


@pytest.mark.parametrize(("rate", "remedy"), [(0.0, "--features"), (1e-3, "fewer or smaller")])
def test_images_that_do_not_fit_in_memory(
    rate: float, remedy: str, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DataSource.from_directory(garments)
    need = 64 * (3 * 16 * 16 + (row_bytes(make_model()) if rate == 0 else 0))
    config = train_config(vision_learning_rate=rate, epochs=1)
    monkeypatch.setattr(workflow, "_physical_memory", lambda: need)
    with pytest.raises(InputError, match=f"64 images take .* of memory.*{remedy}"):
        train_run(config, source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(workflow, "_physical_memory", lambda: 2 * need)
    train_run(config, source, tmp_path / "run")


def test_commands(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_blip2(tmp_path / "blip2")
    cache = str(tmp_path / "cache")
    backbone = f"backbone={tmp_path / 'blip2'}"
    folder = ["--images", str(garments / "images"), "--out", cache]
    assert data.main(["features", "--backbone", str(tmp_path / "blip2"), *folder, "--verify"]) == 0
    said = capsys.readouterr()
    assert "124 images × 5 × 24 × 2 B = 29.8 kB" in said.out
    assert "to write, 0 of 124 images are there" in said.err
    sizes = ["optim.epochs=1", "optim.batch_size=8"]
    runs = [tmp_path / "plain", tmp_path / "cached"]
    assert train.main([backbone, *sizes, "--data", str(garments), "--out", str(runs[0])]) == 0
    assert train.main([backbone, *sizes, "--data", str(garments), "--out", str(runs[1]), "--features", cache]) == 0
    assert losses(runs[0]) == losses(runs[1])
    assert "to write" not in capsys.readouterr().err  # all of it was there
    model = str(runs[1] / "model")
    assert data.main(["features", "--model", model, *folder]) == 0
    assert len(list(Path(cache).iterdir())) == 1  # the trained model's tower is the backbone's
    figures = []
    for options in ([], ["--features", cache]):
        capsys.readouterr()
        assert evaluate.main([model, "--data", str(garments), "--json", *options]) == 0
        figures.append(json.loads(capsys.readouterr().out))
        out = str(tmp_path / f"inputs{len(options)}")
        assert data.main(["encode", model, "--data", str(garments), "--out", out, *options]) == 0
    assert figures[0].keys() == figures[1].keys()
    assert figures[0]["recall_at_50"] == pytest.approx(figures[1]["recall_at_50"], abs=0.1)
    for name in ("queries", "gallery"):
        plain, cached = (np.load(tmp_path / f"inputs{n}" / f"{name}.npy") for n in (0, 2))
        np.testing.assert_allclose(plain, cached, rtol=0, atol=5e-3)
        assert not np.array_equal(plain, cached)  # tokens were rounded to float16, so they did come from the cache


def test_command_mistakes(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(said: str, *arguments: object) -> None:
        capsys.readouterr()
        assert data.main(["features", *map(str, arguments)]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert said in errors[0]

    checkpoint = write_checkpoint(tmp_path / "model")
    out = ("--out", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    refused("not a folder of images", "--model", checkpoint, "--images", tmp_path / "nowhere", *out)
    refused("holds no images", "--model", checkpoint, "--images", tmp_path / "empty", *out)
    refused("overrides go with --backbone", "optim.seed=3", "--model", checkpoint, "--images", garments, *out)
    refused("not a checkpoint", "--model", garments, "--images", garments, *out)
    refused("no such directory", "--backbone", tmp_path / "nowhere", "--images", garments, *out)
    (tmp_path / "file").write_text("")
    refused("cannot hold a feature cache", "--model", checkpoint, "--images", garments, "--out", tmp_path / "file")
    assert train.main(["--data", str(garments), "--out", str(tmp_path / "run"), "--features", str(tmp_path / "cache"), *OVERRIDES]) == 2
    assert "a feature cache needs a frozen tower" in capsys.readouterr().err
