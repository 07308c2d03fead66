"""dqe-data check: counts, blank captions and missing images of made-up datasets."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_benchmarks import WRITERS, write_circo, write_cirr, write_fashioniq

from dqe_training.cli import data


def rows(out: str) -> dict[tuple[str, str], list[str]]:
    """The table by split and category."""
    lines = [line.split() for line in out.splitlines()]
    return {(line[0], line[1]): line[2:] for line in lines if len(line) > 3 and line[0] in ("train", "val", "test", "test1", "all")}


def test_counts_of_fashioniq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashioniq(tmp_path)
    assert data.main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    table = rows(out)
    assert table["train", "toptee"] == ["12", "30", "-", "1"]
    assert table["test", "dress"] == ["3", "6", "-", "0"]
    assert table["val", "shirt"][:2] == ["8", "20"]
    assert int(table["val", "shirt"][2]) <= 12
    assert "train toptee: empty captions (1): toptee-train-2\n" in out
    assert "train toptee: captions of punctuation alone (1): toptee-train-3 '.'\n" in out
    assert f"images: 168 under {tmp_path / 'images'}, 0 missing" in out


def test_missing_images_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashioniq(tmp_path)
    for name in ("dress/Dva000.png", "dress/Dva019.JPG", "toptee/Ttr004.JPG"):
        (tmp_path / "images" / name).unlink()
    listed = tmp_path / "lists" / "missing.txt"
    assert data.main(["check", str(tmp_path), "--missing-list", str(listed)]) == 1
    out = capsys.readouterr().out
    assert "165 under" in out
    assert "3 missing" in out
    assert "val dress: 2 of 20 images missing, which" in out
    assert listed.read_text() == "Dva000\nDva019\nTtr004\n"
    assert data.main(["check", str(write_fashioniq(tmp_path / "whole")), "--missing-list", str(listed)]) == 0
    assert listed.read_text() == ""


def test_a_folder_of_datasets_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name, images=False)
    assert data.main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("images: none given; say where they are with --images DIR") == 4
    for name in WRITERS:
        assert f"{name}: {tmp_path / name}" in out


def test_cirr_and_circo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cirr(tmp_path / "cirr")
    (tmp_path / "cirr" / "captions" / "cap.rc2.train.json").unlink()
    assert data.main(["check", str(tmp_path / "cirr")]) == 0
    out = capsys.readouterr().out
    assert rows(out)["train", "-"] == ["-", "60", "-"]
    assert rows(out)["test1", "-"] == ["10", "60", "1"]
    assert "train: not there: " in out
    assert "test1: queries without any word, for which models read '.' (1): 1004" in out
    write_circo(tmp_path / "circo", images=False, listed=False)
    assert data.main(["check", str(tmp_path / "circo")]) == 0
    out = capsys.readouterr().out
    assert rows(out)["val", "-"] == ["14", "0"]
    assert "val: 7.50 ground truths a query, 1 to 14" in out
    assert "gallery: nothing lists it" in out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fashioniq", "cirr"):
        WRITERS[name](tmp_path / name, images=False)
    for arguments, said in (
        ([tmp_path / "none"], "no such dataset folder"),
        ([tmp_path / "cirr", "--dataset", "circo"], "no annotations of circo here"),
        ([tmp_path / "cirr", "--images", tmp_path / "none"], "no such image folder"),
        ([tmp_path, "--images", tmp_path], "--images is for one dataset, here are cirr, fashioniq"),
        ([tmp_path / "cirr", "--missing-list", tmp_path / "m.txt"], "--missing-list: no images found for"),
        ([tmp_path / "cirr", "--images", tmp_path, "--missing-list", tmp_path / "cirr"], "cannot be written"),
    ):
        assert data.main(["check", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
