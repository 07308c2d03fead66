"""The command lines: what they do, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from support.tiny_benchmarks import write_cirr, write_fashioniq
from support.tiny_training import OVERRIDES, flip_byte

from dqe_training.cli import ablate, data, evaluate, pretrain, train

Main = Callable[[Sequence[str]], int]


def refused(main: Main, arguments: Sequence[object], capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """Exit code 2 and one `error:` line that holds `said`."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured.err
    assert captured.err.splitlines()[-1] == errors[0]
    assert "Traceback" not in captured.err
    for part in said:
        assert part in errors[0]


@pytest.fixture(scope="module")
def run(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `dqe-train` on the tiny dataset."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.main(["--data", str(garments), "--out", str(out), *OVERRIDES]) == 0
    return out


@pytest.fixture
def own(garments: Path, tmp_path: Path) -> Path:
    """Data of one's own: `triplets.jsonl` and `images/`."""
    shutil.copytree(garments / "images" / "train", tmp_path / "images")
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    lines = [
        {"reference": a, "target": b, "text": f"is {c}"} for a, b, c in zip(names, names[1:], ["red", "longer", "shiny"] * 99, strict=False)
    ]
    (tmp_path / "triplets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:12]))
    return tmp_path


def own_arguments(own: Path, *more: object) -> list[object]:
    return ["--triplets", own / "triplets.jsonl", "--images", own / "images", "--out", own / "run", *OVERRIDES, *more]


def test_training_writes_a_model(run: Path, garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "model", "best", "step-00000005", "step-00000010"}
    assert train.main(["--data", str(garments), "--out", str(run), *OVERRIDES]) == 0  # the same again: nothing to do
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "model")


def test_evaluation_prints_figures(run: Path, garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run / "model"), "--data", str(garments), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["queries"], report["gallery"]) == (24, 60)
    assert 0 <= report["recall_at_10"] <= 1
    assert evaluate.main([str(run / "model"), "--data", str(garments)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    value, *rest = lines["recall_at_10"].split()
    assert float(value) == pytest.approx(report["recall_at_10"], abs=1e-4)
    assert rest == f"95 % interval {report['recall_at_10_interval'][0]:.3f} to {report['recall_at_10_interval'][1]:.3f}".split()
    assert "None" not in lines.values()


def test_training_on_ones_own_data_without_labels(own: Path) -> None:
    assert train.main([str(a) for a in own_arguments(own)]) == 0
    assert (own / "run" / "model" / "model.safetensors").is_file()


def test_data_and_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    sizes = ["--train-images", "20", "--train-triplets", "0", "--gallery-images", "10", "--val-queries", "0", "--image-size", "16"]
    assert data.main(["garments", str(out), *sizes]) == 0
    (tmp_path / "tiny.yaml").write_text("model: {preprocessing: {image_size: 16}, vision: {hidden_size: 16, layers: 1, heads: 2}}")
    arguments = [str(out), "--out", str(tmp_path / "tower"), "--config", str(tmp_path / "tiny.yaml"), "--epochs", "1"]
    assert pretrain.main(arguments) == 0
    assert "colour" in capsys.readouterr().out
    refused(pretrain.main, arguments, capsys, "tower: exists already")
    assert pretrain.main([*arguments, "--force"]) == 0


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "shoes"], "'shoes': no such preset"),
        (["optim.epoch=1"], "valid keys of OptimConfig: epochs"),
        (["optim.epochs=many"], "`int`"),
        (["optim.epochs"], "expected section.key=value"),
        (["vision_weights=/nowhere"], "no vision tower here"),
    ],
)
def test_bad_settings(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    refused(train.main, ["--data", garments, "--out", tmp_path / "run", *OVERRIDES, *arguments], capsys, said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"reference": "a', "line 13: not valid JSON"),
        ('{"reference": "000000.jpg", "target": "nowhere.jpg", "text": "in red"}', "1 of 14 images are missing: nowhere.jpg"),
        ('{"reference": "000000.jpg", "target": "000001.jpg", "text": "  "}', "record 13: empty text"),
        ('{"reference": "000000.jpg", "target": "000001.jpg"}', "line 13: "),
        (
            '{"reference": "000000.jpg", "target": "000001.jpg", "text": "x", "attributes": {"fit": "slim"}}',
            "unknown attribute 'fit'; the vocabulary has colour, shape",
        ),
    ],
)
def test_a_bad_line_of_ones_own_data(own: Path, capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    with open(own / "triplets.jsonl", "a") as stream:
        stream.write(line + "\n")
    refused(train.main, own_arguments(own), capsys, said)


def test_other_bad_data(own: Path, garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(train.main, ["--out", own / "run"], capsys, "give either --data DIR, or --triplets FILE with --images DIR")
    refused(train.main, ["--data", own, "--out", own / "run"], capsys, "no train.jsonl here")
    (own / "v.json").write_text('{"attributes": [{"name": "colour", "values": ["red"]}]}')
    refused(train.main, own_arguments(own, "--vocabulary", own / "none.json"), capsys, "no such vocabulary file")
    (own / "labels.jsonl").write_text('{"image": "000000.jpg", "attributes": {"colour": "mauve"}}\n')
    labelled = own_arguments(own, "--vocabulary", own / "v.json", "--image-labels", own / "labels.jsonl")
    refused(train.main, labelled, capsys, "colour is 'mauve'; the vocabulary has red")
    (own / "images" / "000003.jpg").write_bytes((own / "images" / "000003.jpg").read_bytes()[:200])
    refused(train.main, own_arguments(own), capsys, "000003.jpg", "damaged or truncated")
    (own / "triplets.jsonl").write_text("")
    refused(train.main, own_arguments(own), capsys, "holds no records")
    assert not list((own / "run").glob("step-*"))


@pytest.mark.parametrize("write", [write_fashioniq, write_cirr])
def test_a_public_dataset_asks_for_a_backbone(write: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one, the small model for 64-pixel pictures would be trained on photographs, and nothing would say so."""
    folder = write(tmp_path / "set")
    for main in (train.main, ablate.main):
        refused(main, ["--data", folder, "--out", tmp_path / "run"], capsys, "add backbone=Salesforce/blip2-itm-vit-g", "start=RUN/model")
    assert not (tmp_path / "run").exists()


def test_a_tower_that_would_stay_random(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", garments, "--out", tmp_path / "run", *OVERRIDES, "optim.vision_learning_rate=0"]
    refused(train.main, arguments, capsys, "the vision tower would stay random: set start, backbone or vision_weights")


def test_a_run_directory_that_is_a_file(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("in the way")
    refused(train.main, ["--data", garments, "--out", tmp_path / "run", *OVERRIDES], capsys, "run")


def test_resuming_with_other_settings(run: Path, garments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(train.main, ["--data", garments, "--out", run, *OVERRIDES, "optim.seed=5"], capsys, "made with another configuration")


def test_evaluating_what_is_not_there(run: Path, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(evaluate.main, [tmp_path / "none", "--data", garments], capsys, "no such directory")
    refused(evaluate.main, [tmp_path, "--data", garments], capsys, "not a checkpoint")
    refused(evaluate.main, [run / "model", "--data", tmp_path], capsys, "val.jsonl: no such file")
    shutil.copytree(run / "model", tmp_path / "model")
    flip_byte(tmp_path / "model" / "model.safetensors")
    refused(evaluate.main, [tmp_path / "model", "--data", garments], capsys, "damaged")


def test_datasets_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "mine" / "photo.png")
    refused(data.main, ["garments", tmp_path / "mine"], capsys, "holds another dataset or other files")
    small = ["--train-images", "2", "--train-triplets", "50", "--gallery-images", "2", "--image-size", "16"]
    refused(data.main, ["garments", tmp_path / "out", *small], capsys, "too few")
    refused(data.main, ["garments", tmp_path / "out", "--train-triplets", "-3"], capsys, "must not be negative")
    refused(data.main, ["garments", tmp_path / "out", "--image-size", "3"], capsys, "at least 8")
    with pytest.raises(SystemExit) as caught:
        data.main(["garments", str(tmp_path / "out"), "--train-images", "0"])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "shoes"], "'shoes': no such preset"),
        (["start=/nowhere/model"], "start /nowhere/model: not a checkpoint (no checkpoint.json); give a directory that dqe-train wrote"),
    ],
)
def test_a_mistake_in_a_process_of_its_own(arguments: list[str], said: str, tmp_path: Path) -> None:
    """Told before torch is imported, on stderr, without a traceback."""
    code = (
        "import sys; from dqe_training.cli.train import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    finished = in_a_process(code, *arguments, "--data", str(tmp_path), "--out", str(tmp_path / "run"))
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith(f"error: {said}")
    assert finished.stderr.count("\n") == 1


def test_the_package_gives_what_users_call_without_loading_torch() -> None:
    code = """
import sys, dqe_training
assert dqe_training.load_config("garments").optim.epochs > 0
assert "torch" not in sys.modules
assert set(dqe_training.__all__) == set(dqe_training._HOMES)
for name in dqe_training.__all__:
    assert getattr(dqe_training, name).__name__ == name
try:
    dqe_training.nothing
except AttributeError as error:
    print(error)
"""
    finished = in_a_process(code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "module 'dqe_training' has no attribute 'nothing'"


def test_help_imports_neither_torch_nor_onnxruntime() -> None:
    code = """
import importlib, sys
for module in ("dqe_training.cli.train", "dqe_training.cli.evaluate", "dqe_training.cli.data", "dqe_training.cli.pretrain",
               "dqe_training.cli.ablate", "dqe_training.cli.import_", "dqe_export.cli.export", "dqe_export.cli.demo"):
    try:
        importlib.import_module(module).main(["--help"])
    except SystemExit as stop:
        assert stop.code == 0, module
loaded = {"torch", "transformers", "onnxruntime", "onnx"} & set(sys.modules)
assert not loaded, loaded
"""
    finished = in_a_process(code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("usage: dqe-") == 8
