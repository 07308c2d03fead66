"""dqe-train from one command to figures: validation, the best model, the test table; and what would do nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_benchmarks import write_fashioniq
from support.tiny_blip2 import write_blip2
from support.tiny_training import OVERRIDES

from dqe_training.checkpoint import read_meta
from dqe_training.cli import evaluate, train

Figures = dict[str, list[float]]


def tables(out: str) -> list[tuple[str, Figures]]:
    """The tables printed: the first line, and the values of each figure by column."""
    found = []
    for block in out.split("\n\n")[:-1]:
        head, *lines = block.splitlines()
        rows = [line.replace(" *", "").split() for line in lines]
        found.append((head, {name: [float(value) for value in values] for name, *values in rows}))
    return found


def reported(model: Path, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    capsys.readouterr()
    assert evaluate.main([str(model), "--data", str(data), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str], said: str) -> None:
    capsys.readouterr()
    assert train.main([str(a) for a in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line


def test_one_command_trains_validates_and_tests(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train.main(["--data", str(garments), "--out", str(run), "--eval-every", "4", "--test", *OVERRIDES]) == 0
    captured = capsys.readouterr()
    (val, judged), (test, tested) = tables(captured.out)
    assert captured.out.splitlines()[-1] == str(run / "model")
    best = read_meta(run / "best").progress.step
    assert val.split() == f"val model (step 10) best (step {best})".split()
    assert test.split()[0] == "test"
    assert "step 4: R@1 " in captured.err
    for column, name in enumerate(("model", "best")):
        report = reported(run / name, garments, capsys, "--split", "test")
        assert tested["recall_at_10"][column] == pytest.approx(report["recall_at_10"], abs=1e-4)
        assert judged["recall_at_10"][column] == pytest.approx(reported(run / name, garments, capsys)["recall_at_10"], abs=1e-4)
    assert train.main(["--data", str(garments), "--out", str(run), "--eval-every", "4", "--test", *OVERRIDES]) == 0
    assert capsys.readouterr().out == captured.out, "a finished run prints its tables again"


def test_fashioniq_from_blip2_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random BLIP-2 weights, made-up images: train, validate, best, table by the dataset's protocol."""
    data, run = write_fashioniq(tmp_path / "fashioniq"), tmp_path / "run"
    write_blip2(tmp_path / "blip2")
    small = [f"backbone={tmp_path / 'blip2'}", "optim.epochs=3", "optim.batch_size=8", "optim.learning_rate=1e-2", "trns.warmup_epochs=1"]
    arguments = ["--data", str(data), "--out", str(run), "--test", "--features", str(tmp_path / "cache"), "--strict", *small]
    assert train.main(arguments) == 0
    (val, judged), (test, tested) = tables(capsys.readouterr().out)
    assert test.startswith("val: the answers of test are not public")
    assert {"mean", "recall_at_10", "dress/recall_at_10", "toptee/recall_at_50"} <= set(judged)
    assert judged["mean"][1] >= judged["mean"][0]
    assert val.split()[3] == "12)"
    for column, name in enumerate(("model", "best")):
        report = reported(run / name, data, capsys, "--features", str(tmp_path / "cache"))
        assert tested["mean"][column] == judged["mean"][column] == pytest.approx(report["summary"]["mean"], abs=1e-4)
        assert tested["dress/recall_at_10"][column] == pytest.approx(report["sets"][0]["figures"]["recall_at_10"], abs=1e-4)


def own(garments: Path, folder: Path) -> list[object]:
    """Triplets of one's own, with images of the training and the gallery folder."""
    return ["--triplets", garments / "train.jsonl", "--images", garments / "images", "--vocabulary", garments / "vocabulary.json",
            "--out", folder / "run", *OVERRIDES]  # fmt: skip


def test_own_triplets_are_validated_by_own_queries(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = own(garments, tmp_path)
    assert train.main([str(a) for a in (*arguments, "--val-triplets", garments / "val.jsonl")]) == 0
    ((_, judged),) = tables(capsys.readouterr().out)
    assert 0 <= judged["recall_at_10"][1] <= 1
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_what_cannot_be_validated_is_said_and_refused_where_it_was_asked_for(
    garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = own(garments, tmp_path)
    assert train.main([str(a) for a in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "run" / "model")
    assert "not validated: triplets of one's own have no val queries; give some with --val-triplets FILE" in captured.err
    refused([*arguments, "--eval-every", "epoch"], capsys, "give some with --val-triplets FILE")
    refused([*arguments, "--test"], capsys, "triplets of one's own have no test split")
    refused([*arguments, "--eval-every", "never", "--val-triplets", garments / "val.jsonl"], capsys, "leave out one of them")
    folder = shutil.copytree(garments, tmp_path / "damaged")
    (folder / "images" / "gallery" / "000002.jpg").unlink()
    (folder / "test.jsonl").unlink()
    on_folder = ["--data", folder, "--out", tmp_path / "other", *OVERRIDES, "optim.epochs=1"]
    refused([*on_folder, "--eval-every", "3"], capsys, "1 of 60 images are missing")
    refused([*on_folder, "--test"], capsys, "test.jsonl: no such file")
    assert train.main([str(a) for a in on_folder]) == 0
    assert "not validated: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([str(a) for a in (*on_folder, "--eval-every", "sometimes")])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trns.warmup_epochs=2", "TRNS never mines, since trns.warmup_epochs is 2 of 2 optim.epochs"),
        ("loss.rank_weight=0", "TRNS mines negatives that no loss reads, since loss.rank_weight is 0"),
        ("loss.relevance_warmup=1", "the KL loss stays InfoNCE, since loss.relevance_warmup is 1 of the training"),
    ],
)
def test_what_would_do_nothing(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str) -> None:
    arguments = ["--data", garments, "--out", tmp_path / "run", *OVERRIDES, override]
    refused([*arguments, "--strict"], capsys, said)
    assert not list(tmp_path.glob("run/step-*"))
    assert train.main([str(a) for a in arguments]) == 0
    assert f"note: {said}" in " ".join(capsys.readouterr().err.split())
    assert train.main([str(a) for a in ("--data", garments, "--out", tmp_path / "strict", "--strict", *OVERRIDES)]) == 0
    assert "note:" not in capsys.readouterr().err


def test_by_the_clock_it_is_said_at_the_end(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(garments), "--out", str(tmp_path / "run"), *OVERRIDES, "optim.seconds=0.01", "trns.warmup_epochs=1000"]
    assert train.main(arguments) == 0
    assert "TRNS never mined, since training ended within trns.warmup_epochs, 1000" in " ".join(capsys.readouterr().err.split())
