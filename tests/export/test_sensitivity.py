"""Which layers 8 bits hurt, which of them stay in float32, and the queries that tell."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from support.tiny_training import make_model, model_config

from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, TARGET_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import Precision
from dqe_engine.contracts.parsing import parse_json
from dqe_engine.errors import ParityError
from dqe_export import bundle as bundle_module
from dqe_export import calibration
from dqe_export.bundle import ExportOptions, export_bundle
from dqe_export.calibration import EvaluationData, calibration_inputs, parity_inputs, real_inputs, scale_inputs
from dqe_export.converted import check_conversion
from dqe_export.folding import layers_left
from dqe_export.graphs import graph_module, random_inputs
from dqe_export.parity import Reference, check_parity
from dqe_export.precision import Int8, convert
from dqe_export.report import ExportReport
from dqe_export.sensitivity import nodes_of, sweep
from dqe_training.checkpointing.checkpoint import Checkpoint, load_checkpoint
from dqe_training.data.records import TripletRecord

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_sweep_finds_the_layer_that_rounding_ruins() -> None:
    model = make_model(model_config(layers=2))
    ruined = model.qformer.encoder.layer[1].output_query.dense
    with torch.no_grad():
        ruined.weight[:, 0] *= 1e4  # one column takes all 8 bits, and its input is made small
        model.qformer.encoder.layer[1].intermediate_query.dense.weight[0] *= 1e-6
        model.qformer.encoder.layer[1].intermediate_query.dense.bias[0] = -20
    inputs = random_inputs(TARGET_ENCODER, model.sizes, 100, batch=4, text_length=3, seed=0)
    found = sweep("target_encoder", graph_module(TARGET_ENCODER, model), inputs)
    assert found[0].layer == "model.qformer.encoder.layer.1.output_query.dense"
    assert found[0].cosine < found[1].cosine - 1e-3
    assert [s.cosine for s in found] == sorted(s.cosine for s in found)
    with torch.inference_mode():  # nothing stays rounded
        torch.testing.assert_close(graph_module(TARGET_ENCODER, model)(**inputs), model.encode_targets(inputs["image_tokens"]))


def test_nodes_are_found_by_their_weights(bundle_path: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint_path).model
    module = graph_module(TARGET_ENCODER, model)
    source = bundle_path / TARGET_ENCODER.file
    layer = "model.qformer.encoder.layer.0.intermediate_query.dense"
    nodes = nodes_of(source, module, [layer])
    assert nodes_of(source, module, []) == []
    (tmp_path / "float32").mkdir()
    shutil.copy(source, tmp_path / "float32")
    for keep, kept in (([], 0), (nodes, 1)):
        convert(tmp_path / "float32" / TARGET_ENCODER.file, tmp_path / "int8.onnx", "int8", keep=keep)
        weight = dict(module.named_parameters())[f"{layer}.weight"].detach().numpy()
        tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer]
        assert sum(t.shape == weight.T.shape and np.array_equal(t, weight.T) for t in tensors) == kept


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_products_of_pooled_rows_are_not_rounded(precision: Int8, bundle_path: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    """The presence of attributes is read off the mean word, whose sum depends on the batch in the last place."""
    model = load_checkpoint(checkpoint_path).model
    module, source = graph_module(ATTRIBUTE_HEADS, model), bundle_path / ATTRIBUTE_HEADS.file
    pooled = [node for node in onnx.load(source).graph.node if node.op_type == "Gemm"]
    assert len(pooled) == 2
    assert not [layer for layer in layers_left(source, module) if "presence" in layer]
    (tmp_path / "float32").mkdir()
    shutil.copy(source, tmp_path / "float32")
    inputs = random_inputs(ATTRIBUTE_HEADS, model.sizes, 100, batch=4, text_length=3, seed=0)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    convert(tmp_path / "float32" / ATTRIBUTE_HEADS.file, tmp_path / "int8.onnx", precision, inputs=arrays)
    check_conversion(ATTRIBUTE_HEADS, source, tmp_path / "int8.onnx")
    after = onnx.load(tmp_path / "int8.onnx").graph
    assert [node.input for node in after.node if node.op_type == "Gemm"] == [node.input for node in pooled]


def test_zero_vectors_are_not_sensitive() -> None:
    class WithoutHeads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.layer(x), x.new_zeros(2, 3)

    (found,) = sweep("any", WithoutHeads(), {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))})
    assert 0.9 < found.cosine <= 1


def test_layers_are_kept_until_the_gate_passes(wide_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tolerance between what all layers and what all but some reach, some are kept: the most sensitive ones."""
    asked: list[int] = []

    def strict(spec: GraphSpec, model: Any, path: Path, *, precision: Precision, reference: Reference) -> Any:
        kept = sum(t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= 4096 for t in onnx.load(path).graph.initializer)
        if spec is TARGET_ENCODER:
            asked.append(kept)
            if kept < 3:
                raise ParityError("not yet")
        return check_parity(spec, model, path, precision=precision, reference=reference)

    monkeypatch.setattr(bundle_module, "check_parity", strict)
    export_bundle(load_checkpoint(wide_checkpoint), tmp_path / "out", ExportOptions(precision="int8"))
    report = parse_json(ExportReport, (tmp_path / "out" / "report.json").read_bytes(), where="report")
    layers = {graph.graph: graph.layers for graph in report.graphs}
    assert [layer.kept for layer in layers["target_encoder"]] == [i < 4 for i in range(len(layers["target_encoder"]))]
    assert not any(layer.kept for layer in layers["query_encoder"])
    assert asked[-1] >= 3


def test_large_towers_are_swept_only_where_they_have_to_be(wide_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_LARGE", 1)
    misses = iter([True, False])

    def check(spec: GraphSpec, *arguments: Any, **options: Any) -> Any:
        if spec is VISION_ENCODER and next(misses):
            raise ParityError("once")
        return check_parity(spec, *arguments, **options)

    for name, missing in (("close", False), ("far", True)):
        if missing:
            monkeypatch.setattr(bundle_module, "check_parity", check)
        export_bundle(load_checkpoint(wide_checkpoint), tmp_path / name, ExportOptions(precision="int8"))
        report = parse_json(ExportReport, (tmp_path / name / "report.json").read_bytes(), where="report")
        vision, *others = report.graphs
        assert [sum(layer.kept for layer in graph.layers) for graph in report.graphs] == [int(missing), *(0 for _ in others)]
        assert bool(vision.layers) == missing
        assert all(graph.layers for graph in others)


def test_where_no_layer_helps_the_export_fails(wide_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise ParityError("never close enough")

    monkeypatch.setattr(bundle_module, "check_parity", never)
    with pytest.raises(ParityError, match="never close enough"):
        export_bundle(load_checkpoint(wide_checkpoint), tmp_path / "out", ExportOptions(precision="int8"))
    assert list(tmp_path.iterdir()) == []


def test_calibration_takes_the_evaluation_sets_queries(wide_checkpoint: Path, garments: Path) -> None:
    checkpoint, data = load_checkpoint(wide_checkpoint), EvaluationData.open(garments)
    for spec in GRAPHS:
        inputs = calibration_inputs(spec, checkpoint, data)
        assert set(inputs) == {t.name for t in spec.inputs}
        assert all(len(value) == min(calibration.QUERIES, len(data.evaluation.records)) for value in inputs.values())
    real, random = (calibration_inputs(VISION_ENCODER, checkpoint, d)["pixel_values"] for d in (data, None))
    assert not torch.equal(real, random)
    assert real.abs().max() < 4  # normalised pictures


def test_static_scales_are_judged_by_queries_they_were_not_read_off(
    wide_checkpoint: Path, garments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, data = load_checkpoint(wide_checkpoint), EvaluationData.open(garments)
    monkeypatch.setattr(calibration, "QUERIES", 4)
    assert parity_inputs(VISION_ENCODER, checkpoint, data, "int8") is None
    for spec in GRAPHS:
        make = parity_inputs(spec, checkpoint, data, "int8-static")
        assert make is not None
        for batch, length in ((1, 1), (5, 30)):
            found = make(batch=batch, text_length=length, seed=1)
            assert {name: value.shape for name, value in found.items()} == {
                t.name: t.shape(checkpoint.model.sizes, batch=batch, text_length=length) for t in spec.inputs
            }
            if "attention_mask" in found and length == 30:
                assert (found["attention_mask"].sum(dim=1) < 30).all()  # padded
    seen: list[list[TripletRecord]] = []

    def inputs_of(spec: GraphSpec, checkpoint: Checkpoint, data: EvaluationData, records: list[TripletRecord], **_: Any) -> Any:
        seen.append(list(records))

    monkeypatch.setattr(calibration, "_inputs_of", inputs_of)
    scale_inputs(VISION_ENCODER, checkpoint, data)
    real_inputs(VISION_ENCODER, checkpoint, data, batch=100, text_length=1, seed=0)
    records = data.evaluation.records
    assert seen[0] == list(records[:4])
    assert len(seen[1]) == 100
    assert not any(record is used for record in seen[1] for used in seen[0])
