"""dqe-search: what it prints, finds and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.samples import noise_image
from support.signals import interrupts_heard  # noqa: F401 (used by every test here)

from dqe_engine.cli import search as search_command
from dqe_engine.engine import RetrievalEngine


def test_search_by_a_file(image_folder: Path, indexed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for reference in (["--image", str(image_folder / "00.png")], ["--reference", "00.png"]):
        assert search_command.main([*indexed, *reference, "--text", "in red", "-k", "12", "--json"]) == 0
        ids = {hit["id"] for hit in json.loads(capsys.readouterr().out)["hits"]}
        assert ("00.png" in ids) == (reference[0] == "--image")
    with pytest.raises(SystemExit) as caught:
        search_command.main([*indexed, "--image", "x.png", "--reference", "00.png", "--text", "in red"])
    assert caught.value.code == 2
    assert search_command.main(indexed) == 2
    assert "a query needs an image, a text, or both" in capsys.readouterr().err


def test_search_of_an_index_without_items(bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RetrievalEngine.load(bundle_path, provider="cpu", threads=1).save_index(tmp_path / "index")
    noise_image(0).save(tmp_path / "image.png")
    assert search_command.main([str(bundle_path), str(tmp_path / "index"), "--image", str(tmp_path / "image.png"), "--text", "red"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'index'}: there are no images in this index")
    assert error.count("\n") == 1


def test_search_finds_a_flipped_byte(indexed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (targets,) = Path(indexed[1]).glob("*.targets")
    data = bytearray(targets.read_bytes())
    data[len(data) // 2] ^= 1
    targets.write_bytes(data)
    capsys.readouterr()
    options = ["--reference", "00.png", "--text", "in red"]
    assert search_command.main([*indexed, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {targets}: its bytes changed")
    assert error.count("\n") == 1
    assert search_command.main([*indexed, *options, "--no-verify"]) == 0


def test_search_prints_json(indexed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = ["--reference", "00.png", "--text", "in red", "-k", "3", "--weight", "colour=2.0", "--weight", "shape=0", "--zones", "--json"]
    assert search_command.main([*indexed, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["hits"]) == 3
    assert result["hits"][0]["delta"] == 0
    assert result["overrides"] == {"colour": 2.0, "shape": 0.0}
    assert sum(result["zones"]["counts"].values()) == 11


@pytest.mark.parametrize("zones", [[], ["--zones"]])
def test_search_prints_a_table(indexed: list[str], capsys: pytest.CaptureFixture[str], zones: list[str]) -> None:
    capsys.readouterr()
    assert search_command.main([*indexed, "--reference", "00.png", "--text", "red " * 50, *zones]) == 0
    out = capsys.readouterr().out
    assert ".png" in out
    assert "attribute weights: colour" in out
    assert "longer than the model reads" in out
    assert ("equally good" in out) == bool(zones)


def test_search_by_an_image_or_a_text_alone(indexed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert search_command.main([*indexed, "--reference", "00.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "image"
    assert search_command.main([*indexed, "--text", "in red 語", "--explain", "-k", "3", "--offset", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "by a text alone, which the model was not trained for" in shown
    assert "reads as one and the same word: 語" in shown
    assert "colour +" in shown or "colour -" in shown


def test_search_options(indexed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    question = [*indexed, "--reference", "00.png", "--text", "in red", "--json"]

    def hits(*options: str) -> list[str]:
        assert search_command.main([*question, *options]) == 0
        return [hit["id"] for hit in json.loads(capsys.readouterr().out)["hits"]]

    plain = hits("-k", "20")
    assert hits("-k", "3", "--offset", "2") == plain[2:5]
    assert hits("--min-score", "9") == []
    assert not {plain[0], plain[1]} & set(hits("-k", "20", "--exclude", plain[0], "--unlike", plain[1]))
    assert search_command.main([*question, "--set-weight", "colour=0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["colour"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "absent.png", "--text", "in red"], "error: absent.png: no such image file"),
        (["--reference", "absent.png", "--text", "in red"], "error: 'absent.png' is not an id of the index; pass"),
        (["--reference", "00.png", "--text", " "], "error: the modification text ' ' has no words"),
        (["--reference", "00.png", "--text", "red", "--weight", "size=1"], "error: unknown attribute 'size'"),
        (["--reference", "00.png", "--text", "red", "--weight", "colour=-1"], "error: weight of 'colour'"),
        (["--reference", "00.png", "--text", "red", "--filter", '{"a": {"~": 1}}'], "error: filter 'a': unknown operator"),
        (["--reference", "00.png", "--text", "red", "--filter", '{"a": {}}'], "error: filter 'a': {} holds no operator"),
        (
            ["--reference", "00.png", "--text", "red", "--filter", '{"not": [' * 50 + "{}" + "]}" * 50],
            "error: a filter of more than 32 levels",
        ),
    ],
)
def test_what_search_refuses(indexed: list[str], capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    capsys.readouterr()
    assert search_command.main([*indexed, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--weight", "colour"],
        ["--weight", "=1"],
        ["-k", "0"],
        ["--filter", "[1]"],
        ["--filter", "{"],
        ["--filter", "[" * 100_000],
        ["--filter", '{"a":' * 100_000],
        ["--filter", '{"a":' + "9" * 6000 + "}"],
    ],
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        search_command.main(["b", "i", "--image", "x", "--text", "y", *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "expected" in error or "not valid JSON" in error or "the JSON is nested too deeply" in error
    assert len(error) < 1000
