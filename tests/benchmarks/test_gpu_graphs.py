"""Graphs that travel without their weights, and the comparison of graphs with PyTorch, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.tiny_exports import tiny_checkpoint

from benchmarks import gpu_chain, gpu_graphs, gpu_graphs_prepare, weightless
from benchmarks.gpu_graphs_model import SPECS
from benchmarks.weightless import random_values


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as `gpu_graphs.sh` gets it. Its weights are few, and leave the graphs all the same."""
    out = tmp_path_factory.mktemp("carried")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weightless, "_SMALL", 8)
        assert gpu_graphs_prepare.main([str(out), "--small", str(tiny_checkpoint(tmp_path_factory))]) == 0
    return out / "small"


def measured(folder: Path, out: Path, *graphs: str) -> dict[str, list[dict[str, Any]]]:
    options = ["--out", str(out), "--work", str(out / "work"), "--device", "cpu", "--batches", "1", "8", "--seconds", "0"]
    assert gpu_graphs.main(["measure", str(folder), *graphs, *options]) == 0
    found: dict[str, list[dict[str, Any]]] = json.loads((out / "gpu_graphs.json").read_bytes())["sections"]
    return found


def test_weights_depend_on_the_name_alone_and_are_float16s() -> None:
    values = random_values("layer.weight", (300, 200))
    np.testing.assert_array_equal(values, random_values("layer.weight", (300, 200)))
    assert not np.array_equal(values, random_values("other.weight", (300, 200)))
    np.testing.assert_array_equal(values, values.astype(np.float16))
    assert abs(values.std() - 0.02) < 1e-3
    assert abs(random_values("norm.weight", (500,)).mean() - 1) < 0.01


@pytest.mark.slow
def test_no_weight_travels_in_a_graph(carried: Path) -> None:
    paths = list(carried.glob("*.onnx"))
    query = {f"query_encoder-{precision}{mark}" for precision in ("f16", "f32") for mark in ("", "-upstream")}
    vision = {"vision_encoder-f16", "vision_encoder-f32"}
    assert {path.stem for path in paths} == query | vision | {"query_encoder-f16-gpu", "vision_encoder-f16-gpu"}
    for path in paths:
        kept = onnx.load(path, load_external_data=False).graph.initializer
        floats = {t.name for t in kept if t.data_type in (1, 10) and np.prod(t.dims) > 8}
        assert floats == {t.name for t in kept if t.external_data}
        assert len(floats) > 10


@pytest.mark.slow
def test_graphs_with_their_weights_made_again_answer_as_pytorch(carried: Path, tmp_path: Path) -> None:
    found = measured(carried, tmp_path, "query_encoder", "vision_encoder")
    assert "errors" not in found
    assert all(row["within"] for row in found["parity"])
    contenders = {(row["graph"], row["contender"], row["batch"]) for row in found["latency"]}
    for graph in ("query_encoder", "vision_encoder"):
        assert {(graph, name, batch) for name in ("ORT CUDA f16", "PyTorch f16", "ORT CUDA f32") for batch in (1, 8)} <= contenders
    assert {row["contender"] for row in found["parity"]} >= {"ORT CPU f32", "ORT CPU f16", "ORT CUDA f16, fixed shape"}
    assert any(row["contender"] == "ORT CUDA f16, upstream attention" for row in found["latency"])
    assert {row["graph"] for row in found["parity"] if row["contender"] == "ORT CUDA f16, graph for GPUs"} == {*SPECS}


@pytest.mark.slow
def test_graphs_and_search_answer_the_same_whatever_stays_on_the_device(carried: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--device", "cpu", "--batches", "1", "3", "--seconds", "0"]
    assert gpu_chain.main([str(carried), *options, "--items", "500"]) == 0
    found = json.loads((tmp_path / "gpu_graphs.json").read_bytes())["sections"]
    assert [row["equal"] for row in found["answers"]] == [True] * 4
    assert {(row["contender"], row["batch"]) for row in found["latency"]} == {(name, batch) for name in gpu_chain.KEPT for batch in (1, 3)}
    predicted = json.loads(gpu_graphs.PREDICTED.read_bytes())
    assert all(predicted[f"{model}/chain"][batch].keys() == gpu_chain.KEPT.keys() for model in ("small", "full") for batch in ("1", "16"))


@pytest.mark.slow
def test_weights_in_the_wrong_places_are_beyond_the_gate(carried: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(carried, tmp_path / "small"))
    about = json.loads((folder / "model.json").read_bytes())
    weights = about["graphs"]["vision_encoder-f32.onnx"]["weights"]
    product = next(place for place in weights.values() if place["parameter"].endswith("mlp.fc1.weight"))
    product["axes"] = product["axes"][::-1]
    (folder / "model.json").write_text(json.dumps(about))
    parity = measured(folder, tmp_path, "vision_encoder")["parity"]
    assert not any(row["within"] for row in parity if row["contender"].startswith("ORT") and "f32" in row["contender"])
    assert all(row["within"] for row in parity if "f16" in row["contender"])


@pytest.mark.slow
def test_a_contender_that_cannot_run_leaves_the_others_figures(carried: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(carried, tmp_path / "small"))
    (folder / "vision_encoder-f32.onnx").unlink()
    found = measured(folder, tmp_path, "vision_encoder")
    assert {row["contender"] for row in found["errors"]} == {"ORT CUDA f32", "ORT CUDA f32, no TF32", "ORT CPU f32"}
    left = {"ORT CUDA f16", "ORT CUDA f16, graph for GPUs", "PyTorch f16", "ORT CUDA f16, fixed shape"}
    assert {row["contender"] for row in found["latency"]} == left


def test_every_prediction_is_of_a_contender_that_is_measured() -> None:
    timed = {name for phase, _ in gpu_graphs.PHASES for name in phase} | {gpu_graphs.LAYERS, gpu_graphs.COMPILED}
    timed |= gpu_chain.KEPT.keys()
    for graph, batches in json.loads(gpu_graphs.PREDICTED.read_bytes()).items():
        assert graph.split("/")[0] in ("small", "full")
        for batch, cases in batches.items():
            assert batch in ("1", "8", "16", "64")
            assert cases.keys() <= timed
            assert all(case["ms"] > 0 and case["why"] for case in cases.values())
