"""dqe-train from one command to figures: validation, the best model, the test table; and what would do nothing."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.tiny_benchmarks import write_cirr, write_fashioniq
from support.tiny_blip2 import write_blip2
from support.tiny_training import OVERRIDES

from dqe_training.checkpointing.checkpoint import read_meta
from dqe_training.cli import ablate, data, evaluate, train
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl, write_jsonl

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
    captured = capsys.readouterr()
    ((val, judged),) = tables(captured.out)  # once: there are no other queries with public answers
    assert re.search(r"attribute margin acts on [\d.]+ \(triplet, attribute\) pairs of a batch of 8; ", " ".join(captured.err.split()))
    assert val.startswith("val: best was chosen on these queries")
    assert {"mean", "recall_at_10", "dress/recall_at_10", "toptee/recall_at_50"} <= set(judged)
    assert judged["mean"][1] >= judged["mean"][0]
    assert "model (step 12)" in val
    for column, name in enumerate(("model", "best")):
        report = reported(run / name, data, capsys, "--features", str(tmp_path / "cache"))
        assert judged["mean"][column] == pytest.approx(report["summary"]["mean"], abs=1e-4)
        assert judged["dress/recall_at_10"][column] == pytest.approx(report["sets"][0]["figures"]["recall_at_10"], abs=1e-4)


def test_cirr_names_the_command_for_its_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = write_cirr(tmp_path / "cirr"), tmp_path / "run"
    arguments = ["--data", folder, "--out", run, "--config", "own-data", *OVERRIDES, "optim.epochs=1"]
    assert train.main([str(a) for a in (*arguments, "--test")]) == 0
    captured = capsys.readouterr()
    assert len(tables(captured.out)) == 1
    command = f"dqe-eval {run / 'best'} --data {folder} --split test1 --submission OUT"
    assert command in captured.err
    assert evaluate.main([*command.split()[1:-1], str(tmp_path / "out")]) == 0
    capsys.readouterr()
    never = ["--data", folder, "--out", tmp_path / "never", *arguments[4:], "--test", "--eval-every", "never"]
    assert train.main([str(a) for a in never]) == 0
    captured = capsys.readouterr()
    ((title, _),) = tables(captured.out)
    assert title.startswith("val: the answers of test are not public")
    assert f"dqe-eval {tmp_path / 'never' / 'model'} --data" in captured.err


def own(garments: Path, folder: Path) -> list[object]:
    """Triplets of one's own, with images of the training and the gallery folder."""
    return ["--triplets", garments / "train.jsonl", "--images", garments / "images", "--vocabulary", garments / "vocabulary.json",
            "--out", folder / "run", *OVERRIDES]  # fmt: skip


def test_own_triplets_are_validated_by_own_queries(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = own(garments, tmp_path)
    assert train.main([str(a) for a in (*arguments, "--val-triplets", garments / "val.jsonl")]) == 0
    ((_, judged),) = tables(capsys.readouterr().out)
    for column, name in enumerate(("model", "best")):
        asked = [str(tmp_path / "run" / name), "--triplets", str(garments / "val.jsonl"), "--images", str(garments / "images"), "--json"]
        assert evaluate.main(asked) == 0
        report = json.loads(capsys.readouterr().out)
        assert judged["recall_at_10"][column] == pytest.approx(report["recall_at_10"], abs=1e-4)
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
        ("loss.presence_weight=0", "nothing teaches the attribute weights which attributes a text names, since loss.presence_weight is 0"),
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


def test_constant_weights_learn_from_no_text(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", garments, "--out", tmp_path / "run", *OVERRIDES, "model.weights_from=constant"]
    refused(
        arguments, capsys, "model.weights_from constant reads no text, so nothing can learn which attributes a text names; set loss.pre"
    )
    assert train.main([str(a) for a in (*arguments, "--strict", "loss.presence_weight=0")]) == 0


def test_texts_that_name_no_attribute(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [msgspec.structs.replace(r, text="other", attributes=None) for r in read_jsonl(garments / "train.jsonl", TripletRecord)]
    write_jsonl(tmp_path / "mine.jsonl", records)
    arguments = [*own(garments, tmp_path), "--triplets", tmp_path / "mine.jsonl"]
    refused([*arguments, "--strict"], capsys, "presence has nothing to learn from: no text names an attribute")
    refused([*arguments, "--strict", "model.attribute_weights=false", "trns.warmup_epochs=2"], capsys, "must act: TRNS never mines")


def test_deriving_labels_can_be_turned_off(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For each kind of source. What the margin acts on is said at the start, or that it does not act, and why."""
    bare = [msgspec.structs.replace(r, attributes=None, allowed=None) for r in read_jsonl(garments / "train.jsonl", TripletRecord)]
    write_jsonl(tmp_path / "mine.jsonl", bare)
    folder = shutil.copytree(garments, tmp_path / "folder")
    write_jsonl(folder / "train.jsonl", bare)
    labels = read_jsonl(folder / "images.jsonl", ImageRecord)
    write_jsonl(folder / "images.jsonl", [r for r in labels if not r.image.startswith("train/")] + [ImageRecord(labels[0].image, {})])
    fashioniq = write_fashioniq(tmp_path / "fashioniq")
    short = [*OVERRIDES, "optim.epochs=1", "--eval-every", "never"]
    for number, source in enumerate((
        ["--triplets", tmp_path / "mine.jsonl", "--images", garments / "images", "--vocabulary", garments / "vocabulary.json"],
        ["--data", folder],
        ["--data", fashioniq, "--config", "own-data"],
    )):  # fmt: skip
        for option, said in (([], "attribute margin acts on "), (["--no-derived-labels"], "attribute margin inactive: no target has")):
            run = tmp_path / f"run{number}{len(option)}"
            assert train.main([str(a) for a in (*source, "--out", run, *short, *option)]) == 0
            assert said in " ".join(capsys.readouterr().err.split())


def test_a_folder_takes_the_vocabulary_that_is_given(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((garments / "vocabulary.json").read_text())
    written = json.dumps({"attributes": [a | {"words": [*a.get("words", ()), "hue"]} for a in whole["attributes"]]})
    (tmp_path / "mine.json").write_text(written)
    arguments = ["--data", garments, "--out", tmp_path / "run", *OVERRIDES, "optim.epochs=1"]
    refused([*arguments, "--vocabulary", tmp_path / "none.json"], capsys, "none.json: no such vocabulary file")
    refused([*arguments, "--image-labels", tmp_path / "l.jsonl"], capsys, "--image-labels goes with --triplets; a folder of JSON lines")
    assert train.main([str(a) for a in (*arguments, "--vocabulary", tmp_path / "mine.json")]) == 0
    assert "hue" in (tmp_path / "run" / "model" / "vocabulary.json").read_text()
    begun = ["--data", garments, "--out", tmp_path / "on", f"start={tmp_path / 'run' / 'model'}", "optim.epochs=1", "optim.batch_size=8"]
    assert train.main([str(a) for a in begun]) == 0
    assert "hue" not in (tmp_path / "on" / "model" / "vocabulary.json").read_text(), "the folder's own comes before the start's"


def test_options_may_stand_between_overrides(garments: Path, tmp_path: Path) -> None:
    first, *others = OVERRIDES
    assert train.main([first, "--data", str(garments), *others, "--out", str(tmp_path / "run"), "optim.epochs=1"]) == 0
    assert read_meta(tmp_path / "run" / "model").progress.epoch == 1


def test_a_value_allowed_that_the_vocabulary_lacks(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = read_jsonl(garments / "train.jsonl", TripletRecord)
    allowed = {"colour": ["red", "mauve"]}
    write_jsonl(tmp_path / "mine.jsonl", [msgspec.structs.replace(first, allowed=allowed), *rest])
    labelled = ["--triplets", tmp_path / "mine.jsonl", "--image-labels", garments / "images.jsonl"]
    refused([*own(garments, tmp_path), *labelled], capsys, "`allowed` of colour has 'mauve'; the vocabulary has ")


@pytest.mark.parametrize(
    ("parser", "command", "offered"),
    [(train, [], False), (ablate, [], False), (data, ["encode"], False), (data, ["check"], True), (evaluate, [], True)],
)
def test_only_datasets_that_train_are_offered_for_training(parser: Any, command: list[str], offered: bool) -> None:
    found = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(found):
        parser.build_parser().parse_args([*command, "--help"])
    assert "fashioniq" in found.getvalue()
    assert ("pinpoint" in found.getvalue()) is offered


def test_by_the_clock_it_is_said_at_the_end(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(garments), "--out", str(tmp_path / "run"), *OVERRIDES, "optim.seconds=0.01", "trns.warmup_epochs=1000"]
    assert train.main(arguments) == 0
    assert "TRNS never mined, since training ended within trns.warmup_epochs, 1000" in " ".join(capsys.readouterr().err.split())
