"""dqe-data check: counts, blank captions, and missing and damaged images of made-up datasets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.samples import noise_image
from support.tiny_benchmarks import WRITERS, write_circo, write_cirr, write_fashioniq

from dqe_engine.errors import InputError
from dqe_training.cli import data
from dqe_training.data.damage import find_damaged, require_readable


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


HTML = b"\n<!DOCTYPE html><html><body>404</body></html>"


def test_damaged_images_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashioniq(tmp_path)
    images = tmp_path / "images"
    for name in ("dress/Dva019.JPG", "dress/Dva000.png", "toptee/Tva002.webp"):
        content = (images / name).read_bytes()
        (images / name).write_bytes(content[: len(content) // 2])
    (images / "dress" / "Dva001.JPG").write_bytes(b"")
    (images / "shirt" / "Str000.png").write_bytes(HTML)
    listed = tmp_path / "lists" / "damaged.txt"
    assert data.main(["check", str(tmp_path), "--damaged-list", str(listed)]) == 1
    out = capsys.readouterr().out
    assert f"images: 168 under {images}, 0 missing, 5 damaged" in out
    assert "val dress: 3 of 20 images damaged, which" in out
    assert "Dva001 (empty)" in out
    assert "Dva019 (damaged or truncated image" in out
    assert "train shirt: 1 of 30 images damaged, which" in out
    assert "Str000 (a web page)" in out
    names = ("dress/Dva000.png", "dress/Dva001.JPG", "dress/Dva019.JPG", "shirt/Str000.png", "toptee/Tva002.webp")
    assert listed.read_text().splitlines() == [str(images / name) for name in names]


def test_damage_in_the_middle_takes_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashioniq(tmp_path)
    path = tmp_path / "images" / "dress" / "Dva000.png"
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 40
    content[at : at + 4] = bytes(4)
    path.write_bytes(content)
    assert data.main(["check", str(tmp_path)]) == 0
    capsys.readouterr()
    assert data.main(["check", str(tmp_path), "--decode"]) == 1
    assert "1 damaged" in capsys.readouterr().out


def save(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("decode", [False, True])
def test_what_is_damaged_and_what_is_not(decode: bool, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3)).astype(np.uint8))
    jpeg, png, webp = (save(picture, kind) for kind in ("JPEG", "PNG", "WEBP"))
    whole = {
        "plain.jpg": jpeg, "plain.png": png, "plain.webp": webp, "padded.jpg": jpeg + bytes(500), "trailer.jpg": jpeg + b"camera" * 50,
        "trailer.png": png + b"x" * 100, "other.jpg": save(picture, "GIF"),
    }  # fmt: skip
    formats = (("jpg", jpeg), ("png", png), ("webp", webp))
    damaged = {f"{share}.{name}": content[: int(len(content) * share)] for name, content in formats for share in (0.01, 0.5, 0.97)}
    damaged |= {
        "empty.jpg": b"", "page.jpg": HTML, "page.png": b"<html>", "text.jpg": b"Not found", "sparse.jpg": jpeg[:2000] + bytes(len(jpeg)),
        "header.jpg": b"\xff\xd8\xff" + b"junk" * 50 + b"\xff\xd9", "zeros.png": bytes(5000),
    }  # fmt: skip
    for name, content in (whole | damaged).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    names = [*whole, *damaged, "folder.jpg", "dangling.jpg"]
    seen: list[tuple[int, int]] = []
    found = find_damaged(tmp_path, names, decode=decode, progress=lambda done, total: seen.append((done, total)))
    assert list(found) == names[len(whole) :]
    assert seen[-1] == (len(names), len(names))
    assert (found["empty.jpg"], found["page.jpg"], found["page.png"]) == ("empty", "a web page", "a web page")
    assert not any("\n" in problem or str(tmp_path) in problem for problem in found.values())


def test_all_damaged_images_in_one_line(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(b"" if name < "e" else save(noise_image(0), "PNG"))
    with pytest.raises(InputError) as caught:
        require_readable(tmp_path, [f"{name}.png" for name in "abcde"])
    expected = "4 of 5 images cannot be read: a.png (empty), b.png (empty), c.png (empty) and 1 more; repair, replace or leave them out"
    assert str(caught.value) == f"{tmp_path}: {expected}"


def test_a_folder_of_datasets_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name, images=False)
    assert data.main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("images: none given; say where they are with --images DIR") == len(WRITERS)
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
