"""dqe-ablate on tiny data: what it writes, that it goes on after an interruption, and its mistakes in one line."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_benchmarks import write_fashioniq
from support.tiny_blip2 import write_blip2
from support.tiny_training import OVERRIDES

from dqe_engine.files import directory_lock
from dqe_training.ablation import plan, running
from dqe_training.ablation import results as results_on_disk
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.cli import ablate, evaluate
from dqe_training.evaluation.split import EvaluationSplit, judge_checkpoint
from dqe_training.features import writing
from dqe_training.run import workflow
from dqe_training.run.step import TrainingStep

TINY = (*OVERRIDES, "trns.zones.lo=0.05", "trns.zones.hi=0.5", "trns.picks=4")
VARIANTS = ("--variants", "baseline,+trns", "--seeds", "2")


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), *VARIANTS, *TINY, *more]


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def without_time(found: Any) -> Any:
    """results.json but for the seconds."""
    for part in (*found["cells"].values(), *found["arms"]):
        del part["seconds"]
    return found


@pytest.fixture(scope="module")
def finished(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ablation of four cells."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    assert ablate.main(command(garments, out)) == 0
    return out


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """The (mines negatives, seed) of every training that starts."""
    started: list[tuple[bool, int]] = []

    def train_run(config: Any, *arguments: Any, **options: Any) -> Any:
        started.append((config.trns.enabled, config.optim.seed))
        return workflow.train_run(config, *arguments, **options)

    monkeypatch.setattr(running, "train_run", train_run)
    return started


def test_what_is_written(finished: Path, garments: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"results.json", "table.md", "plot.png", "cells"}
    found = results(finished)
    assert [(arm["label"], arm["seeds"], arm["steps"]["mean"]) for arm in found["arms"]] == [
        ("baseline", [0, 1], 10.0),
        ("+trns", [0, 1], 10.0),
    ]
    assert {path.stem for path in (finished / "cells").iterdir()} == set(found["cells"])
    assert found["unfinished"] == 0
    baseline, trns = found["arms"]
    assert (baseline["refreshes"]["mean"], trns["refreshes"]["mean"]) == (0, 1)
    assert not baseline["differences"]
    assert {"recall_at_10", "map_at_10", "attribute_precision_at_10", "near_confusion"} <= set(trns["differences"])
    assert {"zone_false_negatives", "zone_pull", "stale_in_mid"} <= set(trns["figures"])
    assert "zone_pull" not in baseline["figures"]
    for arm in found["arms"]:
        for name, figure in arm["figures"].items():
            cells = [cell["figures"][name] for cell in found["cells"].values() if cell["arm"] == arm["label"]]
            cells = [value for value in cells if value is not None]
            assert figure["values"] == cells
            assert figure["mean"] == pytest.approx(np.mean(cells))
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| +trns | 2 | 10 |" in (finished / "table.md").read_text()


def test_nothing_finished_runs_again_and_more_seeds_are_added(
    finished: Path, garments: Path, tmp_path: Path, trained: list[tuple[bool, int]]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert ablate.main(command(garments, out)) == 0
    assert trained == []
    assert results(out) == results(finished)
    assert ablate.main(command(garments, out, "--seeds", "0,7")) == 0
    assert trained == [(False, 7), (True, 7)]
    assert results(out)["arms"][0]["seeds"] == [0, 7]
    cell = next(key for key, cell in results(out)["cells"].items() if (cell["arm"], cell["seed"]) == ("+trns", 0))
    (out / "cells" / f"{cell}.json").unlink()
    trained.clear()
    assert ablate.main(command(garments, out)) == 0
    assert trained == [(True, 0)]
    assert without_time(results(out)) == without_time(results(finished))


def test_a_changed_method_trains_again(
    finished: Path,
    garments: Path,
    tmp_path: Path,
    trained: list[tuple[bool, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for module in (plan, results_on_disk):
        monkeypatch.setattr(module, "source_hash", lambda: "another")
    assert ablate.main(command(garments, out, "--seeds", "1")) == 0
    assert trained == [(False, 0), (True, 0)]
    assert f"4 finished cells in {out / 'cells'} are of other code and not used" in capsys.readouterr().err
    assert len(list((out / "cells").iterdir())) == 4 + 2, "what the other code found is still there"


def test_settings_are_chosen_on_val_and_reported_on_test(garments: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(garments, out, "--split", "test", "--seeds", "1", "--keep-models")
    assert ablate.main(arguments) == 0
    found = results(out)
    assert "24 test queries" in found["data"]
    test = EvaluationSplit.of_folder(garments, "test")
    for key, cell in found["cells"].items():
        figures = judge_checkpoint(out / "models" / key, test)
        assert cell["figures"]["recall_at_10"] == pytest.approx(figures["recall_at_10"], abs=1e-5)
        assert cell["figures"]["map_at_10"] == pytest.approx(figures["map_at_10"], abs=1e-5)


@pytest.mark.parametrize("moment", ["in training", "before evaluation"])
def test_an_interrupted_run_goes_on(
    finished: Path, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """Ctrl-C in the second cell; then the same command ends as if nothing had happened."""
    out = tmp_path / "out"
    steps = 0

    def interrupt(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == (14 if moment == "in training" else 2):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    owner, name = (TrainingStep, "run") if moment == "in training" else (running, "audit")
    with monkeypatch.context() as patch:
        original: Callable[..., Any] = getattr(owner, name)
        patch.setattr(owner, name, interrupt)
        assert ablate.main(command(garments, out, "optim.checkpoint_every=2")) == 130
    assert len(results(out)["cells"]) == 1
    assert "**3 cells are not finished**" in (out / "table.md").read_text()
    assert len(list((out / "runs").iterdir())) == 1
    capsys.readouterr()
    assert ablate.main(command(garments, out, "optim.checkpoint_every=2")) == 0
    assert "resumed at step" in capsys.readouterr().err
    whole = without_time(results(finished))
    again = without_time(results(out))
    assert [arm["figures"] for arm in again["arms"]] == [arm["figures"] for arm in whole["arms"]]


def test_kept_models_evaluate_alike(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert ablate.main(command(garments, out, "--variants", "full", "--seeds", "1", "--keep-models")) == 0
    (key, cell), *others = results(out)["cells"].items()
    assert not others
    assert not (out / "plot.png").exists()
    assert load_checkpoint(out / "models" / key).meta.progress.step == cell["steps"]
    capsys.readouterr()
    assert evaluate.main([str(out / "models" / key), "--data", str(garments), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("recall_at_1", "recall_at_10", "map_at_10", "attribute_precision_at_10"):
        assert cell["figures"][name] == pytest.approx(report[name], abs=1e-5)


def test_a_grid_and_equal_time(garments: Path, tmp_path: Path) -> None:
    arguments = command(
        garments, tmp_path / "out", "--seeds", "1", "--budget", "seconds", "optim.seconds=0.3", "--sweep", "trns.zones.hi=0.1,0.5"
    )
    assert ablate.main(arguments) == 0
    found = results(tmp_path / "out")
    assert [arm["label"] for arm in found["arms"]] == ["baseline", "+trns hi=0.1", "+trns hi=0.5"]
    assert found["budget"] == "seconds"
    assert all(cell["seconds"] >= 0.3 for cell in found["cells"].values())
    assert "nothing can be concluded" in (tmp_path / "out" / "table.md").read_text()


def test_a_frozen_tower_encodes_each_image_once(garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = 0
    original = writing.encode_pixels

    def counting(model: Any, pixels: Any) -> Any:
        nonlocal encoded
        encoded += len(pixels)
        return original(model, pixels)

    monkeypatch.setattr(writing, "encode_pixels", counting)
    write_blip2(tmp_path / "blip2")
    overrides = [f"backbone={tmp_path / 'blip2'}", "optim.epochs=1", "optim.batch_size=8"]
    assert (
        ablate.main(["--data", str(garments), "--out", str(tmp_path / "out"), "--variants", "baseline,+kl", "--seeds", "1", *overrides])
        == 0
    )
    assert len(results(tmp_path / "out")["cells"]) == 2
    assert encoded == 64 + 60, "training images and gallery, once for all cells"


def test_a_public_dataset_is_judged_by_its_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_fashioniq(tmp_path / "fashioniq"), tmp_path / "out"
    write_blip2(tmp_path / "blip2")
    small = [f"backbone={tmp_path / 'blip2'}", "optim.epochs=1", "optim.batch_size=8", "trns.warmup_epochs=0"]
    arguments = ["--data", str(data), "--out", str(out), "--variants", "baseline,full", "--seeds", "1", "--keep-models", *small]
    assert ablate.main(arguments) == 0
    for key, cell in results(out)["cells"].items():
        assert load_checkpoint(out / "models" / key).meta.config.model.preprocessing.fit == "target_pad_crop", "the dataset's preset"
        capsys.readouterr()
        assert evaluate.main([str(out / "models" / key), "--data", str(data), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)["summary"]
        assert [cell["figures"][f"recall_at_{k}"] for k in (10, 50)] == pytest.approx(
            [summary[f"recall_at_{k}"] for k in (10, 50)], abs=1e-5
        )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--variants", "baseline,best"], "variant 'best': expected baseline, full, +pool"),
        (["--variants", "full,+kl+law+trns"], "train the same"),
        (["--sweep", "trns.zones.hi"], "expected section.key=value"),
        (["--sweep", "trns.zones.high=0.1,0.2"], "valid keys of ZoneSpec: lo, hi"),
        (["--budget", "seconds"], "optim.seconds=60"),
        (["optim.epoch=2"], "valid keys of OptimConfig"),
        (["--config", "shoes"], "'shoes': no such preset"),
        (["--images", "photos"], "leave out --images"),
        (["optim.vision_learning_rate=0"], "the vision tower would stay random"),
    ],
)
def test_mistakes_are_one_line(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert ablate.main(command(garments, tmp_path / "out", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "out" / "cells").exists()


def test_a_damaged_cell_is_named(finished: Path, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    first, second = sorted((out / "cells").iterdir())[:2]
    second.write_bytes(second.read_bytes()[:-40])
    assert ablate.main(command(garments, out)) == 2
    assert f"{second.name}: not valid JSON" in capsys.readouterr().err
    shutil.copy(first, second)
    assert ablate.main(command(garments, out)) == 2
    assert "holds the result of another cell than its name says" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way")
    assert ablate.main(command(garments, tmp_path / "out")) == 2
    assert "cannot be the output folder" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("4,9", (4, 9)), ("5,", (5,))])
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert ablate.build_parser().parse_args(["--data", "x", "--out", "y", "--seeds", text]).seeds == seeds


@pytest.mark.parametrize("text", ["0", "", ",", "-1", "a", "1,b"])
def test_what_are_no_seeds(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablate.build_parser().parse_args(["--data", "x", "--out", "y", "--seeds", text])
    capsys.readouterr()


def test_processes_share_the_cells(finished: Path, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that another process has is passed over, and waited for in the end; what the other finished is not trained again."""
    out, order = tmp_path / "out", []
    run_cell = running._run_cell
    held, done = threading.Event(), threading.Event()

    def counted(cell: Any, *arguments: Any) -> None:
        order.append((cell.arm, cell.seed))
        run_cell(cell, *arguments)
        if len(order) == 3:
            done.set()

    monkeypatch.setattr(running, "_run_cell", counted)
    first = results(finished)["cells"]
    key = next(key for key, cell in first.items() if (cell["arm"], cell["seed"]) == ("baseline", 0))
    claim = out / "claims" / key
    claim.mkdir(parents=True)
    (out / "cells").mkdir()

    def other() -> None:
        with directory_lock(claim):
            held.set()
            done.wait(60)
            shutil.copy(finished / "cells" / f"{key}.json", out / "whole")
            (out / "whole").rename(out / "cells" / f"{key}.json")  # at once, as a process that trained it does

    process = threading.Thread(target=other)
    process.start()
    held.wait(60)
    assert ablate.main(command(garments, out)) == 0
    process.join()
    assert ("baseline", 0) not in order
    assert len(order) == len(first) - 1
    assert without_time(results(out)) == without_time(results(finished))
    assert not (out / "claims").exists()
