"""The recall benchmark from end to end on a tiny checkpoint, its bundle and made-up datasets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.tiny_benchmarks import write_circo, write_cirr, write_fashioniq
from support.tiny_training import model_config, write_checkpoint

from benchmarks import compare, recall
from benchmarks.harness import Rounds
from benchmarks.retrieval import sections, setting
from dqe_training.data.public.detect import open_benchmark
from dqe_training.evaluation.benchmarks import evaluate_benchmark
from dqe_training.evaluation.rankers import open_ranker

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("faiss", reason="faiss-cpu, of the extra bench")


@pytest.fixture
def inputs(checkpoint_path: Path, bundle_path: Path, garments: Path) -> list[str]:
    return ["--bundle", str(bundle_path), "--checkpoint", str(checkpoint_path), "--data", str(garments), "--quick"]


@pytest.fixture(autouse=True)
def _no_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other precisions are dqe-export's business, and take seconds each; here all of them are the float32 bundle."""
    monkeypatch.setattr(setting.Setting, "bundle_of", lambda self, precision: self.bundle)
    rounds = Rounds(minimum=1, maximum=1, seconds=0)
    small = sections.Sizes(queries=24, items=60, batches=(1, 8), rounds=rounds, galleries=(400,), asked=16, lists=8)
    monkeypatch.setattr(sections.Sizes, "quick", lambda: small)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "recall.json").read_text())
    return found


def test_sections_are_measured_written_and_kept(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*inputs, "--out", str(tmp_path)]
    assert recall.main([*run, "--only", "precision"]) == 0
    (reference, *bundles) = results(tmp_path)["sections"]["precision"]["rows"]
    assert [row["name"] for row in bundles] == ["bundle f32", "bundle f16", "bundle int8"]
    for row in bundles:
        assert row["figures"] == reference["figures"]
        assert set(map(tuple, row["difference"].values())) == {(0, 0, 0)}
    assert recall.main([*run, "--only", "storage", "--only", "pareto"]) == 0
    found = results(tmp_path)
    assert list(found["sections"]) == ["precision", "storage", "pareto"]
    rows = {row["name"]: row for row in found["sections"]["storage"]["rows"]}
    exact = rows["ours f32"]["figures"]
    assert exact == reference["figures"]
    for name, row in rows.items():
        if row["status"] != "ok":
            assert "fewer than 256 to train on" in row["status"]
            continue
        assert row["batches"].keys() == {"1", "8"}
        if row["exact"] and not name.startswith("ours f16"):
            assert row["figures"] == exact, name
    assert {path.name for path in tmp_path.iterdir()} == {"recall.json", "recall.md", "recall-pareto.png", "recall-storage.png"}
    text = (tmp_path / "recall.md").read_text()
    assert "## storage" in text
    assert "shows that it runs" in text
    assert "ours f16, screened" in capsys.readouterr().out
    same = str(tmp_path / "recall.json")
    assert compare.main([same, same, "--fail-above", "1"]) == 0


def test_public_datasets_run_by_their_protocols_where_given(
    inputs: list[str], checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"fashioniq": write_fashioniq(tmp_path / "fashioniq"), "circo": write_circo(tmp_path / "circo")}
    given = [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
    assert recall.main([*inputs, "--out", str(tmp_path / "out"), "--only", "public", *given]) == 0
    datasets = {entry["name"]: entry for entry in results(tmp_path / "out")["sections"]["public"]["datasets"]}
    assert datasets["cirr"] == {"name": "cirr", "status": "not run: no images here (--cirr DIR)", "rows": []}
    for name, folder in folders.items():
        benchmark = open_benchmark(folder, name)
        assert benchmark is not None
        report, _ = evaluate_benchmark(benchmark, open_ranker(checkpoint_path), split="val")
        for row in datasets[name]["rows"]:
            assert {part["name"]: part["figures"] for part in row["report"]["sets"]} == {part.name: part.figures for part in report.sets}
    text = capsys.readouterr().out
    assert "cirr: not run: no images here" in text
    assert "| dress recall_at_10 |" in text


def test_bundles_come_from_dqe_export(
    checkpoint_path: Path, bundle_path: Path, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for once, by its command line; where it refuses, its last line is the reason."""
    monkeypatch.undo()
    commands: list[list[str]] = []

    def export(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "int8" in command:
            return subprocess.CompletedProcess(command, 1, "", "loading\nerror: too far from PyTorch\n")
        Path(command[2]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", export)
    options: dict[str, Any] = {"queries": 4, "items": 10}
    opened = setting.open_setting(bundle_path, checkpoint_path, garments, tmp_path, **options)
    assert opened.bundle_of("f32") == bundle_path
    assert opened.bundle_of("f16") == opened.bundle_of("f16") == Path(commands[0][2])
    with pytest.raises(setting.NotExportedError, match="error: too far from PyTorch"):
        opened.bundle_of("int8")
    assert [command[4] for command in commands] == ["f16", "int8"]
    frugal = setting.open_setting(bundle_path, checkpoint_path, garments, tmp_path, exports=False, **options)
    assert frugal.bundle_of("f16").is_dir()
    with pytest.raises(setting.NotExportedError, match="--quick exports nothing"):
        frugal.bundle_of("int8")


@pytest.mark.parametrize("missing", ["bundle", "checkpoint", "data"])
def test_what_is_missing_is_said_with_what_to_run(
    missing: str, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recall.main([*inputs, f"--{missing}", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"--{missing}" in error
    assert "make demo" in error
    assert not (tmp_path / "recall.json").exists()


def test_a_bundle_of_another_model_is_refused(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_checkpoint(tmp_path / "other", model_config(embedding_dim=4))
    assert recall.main([*inputs, "--checkpoint", str(other), "--out", str(tmp_path), "--only", "precision"]) == 2
    assert "answers otherwise than --checkpoint" in capsys.readouterr().err


def test_a_dataset_folder_without_images_ends_with_2(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_cirr(tmp_path / "cirr", images=False)
    assert recall.main([*inputs, "--out", str(tmp_path), "--only", "public", "--cirr", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err


def test_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert recall.main(["--list"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["precision", "storage", "pareto", "public"]
    with pytest.raises(SystemExit) as ended:
        recall.main(["--only", "speed"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        recall.main(["--quick", "--full"])
    assert ended.value.code == 2


def test_a_part_of_a_dataset_keeps_what_its_queries_need(garments: Path) -> None:
    whole, part = setting.part_of(garments, 10_000, 10_000), setting.part_of(garments, 5, 20)
    assert len(part.records) == 5
    assert len(part.gallery) == 20
    for row in range(5):
        assert part.gallery[part.target[row]] == whole.gallery[whole.target[row]]
    assert [name for name in whole.gallery if name in part.gallery] == list(part.gallery)
