"""Export: the bundle equals PyTorch at shapes that were not traced, a wrong graph is refused, a failure leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.corruptions import TRACED
from support.full_disk import files_of_at_most
from support.replayed_export import replay
from support.tiny_training import flip_byte, make_model, model_config, write_tiny_garments

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, DYNAMIC_AXES, GRAPHS, QUERY_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import REPORT_FILES
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import ExportError
from dqe_export import onnx_graph
from dqe_export.bundle import ExportOptions, export_bundle
from dqe_export.cli.export import main
from dqe_export.differences import TOLERANCES
from dqe_export.graphs import graph_module, random_inputs
from dqe_export.onnx_graph import OPSET, export_graph
from dqe_export.parity import check_parity, shapes_of
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.cli import evaluate
from dqe_training.config import BaseQuery, WeightInputs
from dqe_training.evaluation.protocol import load_evaluation_set
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.runtime import agreement, evaluate_engine, index_gallery

pytestmark = pytest.mark.usefixtures("one_thread")


# -- the bundle -----------------------------------------------------------------------------------------------------------


def test_the_bundle_is_complete(bundle_path: Path, checkpoint_path: Path) -> None:
    manifest = Bundle.load(bundle_path).manifest
    assert {path.name for path in bundle_path.iterdir()} == {
        "manifest.json",
        "tokenizer.json",
        *REPORT_FILES,
        *(spec.file for spec in GRAPHS),
    }
    assert {entry.path for entry in manifest.files} == {"tokenizer.json", *(spec.file for spec in GRAPHS)}
    assert (manifest.name, manifest.opset, manifest.precision, manifest.graphs) == ("tiny", OPSET, "float32", GRAPHS)
    checkpoint = load_checkpoint(checkpoint_path)
    assert manifest.sizes == checkpoint.model.sizes
    assert manifest.vocabulary == checkpoint.vocabulary
    assert manifest.preprocessing == checkpoint.meta.config.model.preprocessing
    assert manifest.zones == checkpoint.meta.serving_zones == ZoneSpec(lo=0.03, hi=0.25, policy="hardest")
    assert (bundle_path / "tokenizer.json").read_bytes() == (checkpoint_path / "tokenizer.json").read_bytes()


def test_parity_was_measured_and_is_recorded(bundle_path: Path, checkpoint_path: Path) -> None:
    parity = Bundle.load(bundle_path).manifest.parity
    assert Bundle.load(bundle_path).manifest.tolerance == TOLERANCES["float32"]
    model = load_checkpoint(checkpoint_path).model
    shapes = {spec.name: shapes_of(spec, model) for spec in GRAPHS} | {"composed_query": shapes_of(QUERY_ENCODER, model)}
    wanted = {spec.name: {t.name for t in spec.outputs} for spec in GRAPHS} | {"composed_query": {"query"}}
    assert {p.graph: set(p.outputs) for p in parity} == wanted
    for measured in parity:
        assert all(0 <= output.mean_error <= output.max_error <= 1e-4 for output in measured.outputs.values())
        assert all(0.999999 <= output.cosine_min <= output.cosine_mean <= 1 + 1e-12 for output in measured.outputs.values())
        assert measured.shapes == shapes[measured.graph]
        assert {"batch": 3, "text_length": 6} not in measured.shapes  # the traced one
        assert measured.batch_dependence is not None
        assert measured.batch_dependence <= 1e-6


@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
def test_graphs_equal_pytorch_at_every_shape(spec: GraphSpec, bundle_path: Path, checkpoint_path: Path) -> None:
    model = load_checkpoint(checkpoint_path).model
    session = Bundle.load(bundle_path).session(spec, provider="cpu", threads=1)
    lengths = range(1, 33) if spec in (QUERY_ENCODER, ATTRIBUTE_HEADS) else (2,)
    for batch, length in [*((3, n) for n in lengths), (1, 9), (64, 2), (1, 1), (2, 1)]:
        inputs = random_inputs(spec, model.sizes, 100, batch=batch, text_length=length, seed=batch * 100 + length)
        with torch.inference_mode():
            expected = graph_module(spec, model)(**inputs)
        found = session.run(**{name: value.numpy() for name, value in inputs.items()})
        for tensor, reference in zip(spec.outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
            np.testing.assert_allclose(found[tensor.name], reference.numpy(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
def test_axes_are_symbolic_where_the_spec_says_so(spec: GraphSpec, bundle_path: Path, checkpoint_path: Path) -> None:
    sizes = load_checkpoint(checkpoint_path).model.sizes
    graph = onnx.load(bundle_path / spec.file).graph
    for declared, values in ((spec.inputs, graph.input), (spec.outputs, graph.output)):
        assert [v.name for v in values] == [t.name for t in declared]
        for tensor, value in zip(declared, values, strict=True):
            for axis, dim in zip(tensor.axes, value.type.tensor_type.shape.dim, strict=True):
                if axis in DYNAMIC_AXES:
                    assert dim.dim_param == axis
                else:
                    assert dim.dim_value == (axis if isinstance(axis, int) else getattr(sizes, axis))


def test_nothing_of_this_machine_is_inside(bundle_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    private = {str(repository), str(Path.home()), str(bundle_path.parent), "site-packages", "dqe_export", "dqe_training", ".py"}
    for path in bundle_path.iterdir():
        content = path.read_bytes()
        for word in private - {"/"}:
            assert word.encode() not in content, f"{word} in {path.name}"
    for spec in GRAPHS:
        proto = onnx.load(bundle_path / spec.file)
        assert [o.version for o in proto.opset_import if o.domain == ""] == [OPSET]
        assert not proto.doc_string
        assert not proto.metadata_props
        assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_checkpoint_and_bundle_agree(checkpoint_path: Path, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    garments = write_tiny_garments(tmp_path / "garments")
    evaluation = load_evaluation_set(garments)
    checkpoint = load_checkpoint(checkpoint_path)
    images = encode_gallery_images(checkpoint.model, garments / "images", evaluation)
    ours = evaluate_model(checkpoint.model, checkpoint.tokenizer, evaluation, images)
    engine = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    index_gallery(engine, garments / "images", evaluation)
    theirs = evaluate_engine(engine, evaluation, batch_size=7)
    same, difference, recalls = agreement(ours, theirs)
    assert (same, recalls) == (1.0, True)
    assert difference <= 1e-5
    np.testing.assert_array_equal(ours[1].ranked, theirs[1].ranked)
    np.testing.assert_allclose(ours[1].weights, theirs[1].weights, rtol=0, atol=1e-5)
    assert ours[0] == theirs[0]
    figures = []
    for model in (checkpoint_path, bundle_path):
        capsys.readouterr()
        assert evaluate.main([str(model), "--data", str(garments), "--json"]) == 0
        figures.append(capsys.readouterr().out)
    assert figures[0] == figures[1]


@pytest.mark.slow
@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
def test_the_baseline_exports_too(spec: GraphSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pooled target token, and a query without attribute weights. None of its graphs is traced again to be taken apart."""
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    model = make_model(model_config(pooled=True, attribute_weights=False, max_text_length=5))
    export_graph(spec, model, tmp_path / spec.file)
    parity = check_parity(spec, model, tmp_path / spec.file)
    assert parity.shapes == shapes_of(spec, model)
    assert max(shape.get("text_length", 5) for shape in parity.shapes) == 5
    assert max(output.max_error for output in parity.outputs.values()) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("spec", [QUERY_ENCODER, ATTRIBUTE_HEADS], ids=lambda s: s.name)
@pytest.mark.parametrize(("base_query", "weights_from"), [("pool", "text+image"), ("cls", "text"), ("mean", "constant")])
def test_other_base_queries_and_weights_that_see_export_too(
    spec: GraphSpec, base_query: BaseQuery, weights_from: WeightInputs, tmp_path: Path
) -> None:
    model = make_model(model_config(base_query=base_query, weights_from=weights_from))
    export_graph(spec, model, tmp_path / spec.file)
    parity = check_parity(spec, model, tmp_path / spec.file)
    assert max(output.max_error for output in parity.outputs.values()) <= 1e-4


# -- wrong graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a head's weight nudged", "a fixed batch"])
@pytest.mark.parametrize("force", [False, True])
def test_a_wrong_graph_is_refused_and_nothing_is_left(
    name: str, force: bool, bundle_path: Path, checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole exports; test_corruptions.py has all that the gate refuses."""
    checkpoint, wrong = load_checkpoint(checkpoint_path), TRACED[name]

    def edit(graph: str, proto: onnx.ModelProto) -> None:
        if graph == wrong.graph.name:
            wrong.edit(proto, checkpoint.model)

    monkeypatch.setattr(torch.onnx, "export", replay(bundle_path, edit))
    if force:
        shutil.copytree(bundle_path, tmp_path / "out")
    with pytest.raises(ExportError) as caught:
        export_bundle(checkpoint, tmp_path / "out", force=force)
    assert wrong.said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])
    if force:  # the bundle that was to be replaced is still there
        assert Bundle.load(tmp_path / "out").model_hash == Bundle.load(bundle_path).model_hash


def test_the_replay_itself_is_right(bundle_path: Path, checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", replay(bundle_path))
    stages: list[str] = []
    manifest = export_bundle(load_checkpoint(checkpoint_path), tmp_path / "out", ExportOptions(name="tiny"), advance=stages.append)
    assert to_json(manifest) == (tmp_path / "out" / "manifest.json").read_bytes()
    assert manifest.model_hash == Bundle.load(bundle_path).model_hash
    assert stages[0] == "exporting vision_encoder"
    assert stages[-1] == "verifying"


def test_large_graphs_keep_their_weights_beside_them(
    bundle_path: Path, checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", replay(bundle_path))
    monkeypatch.setattr(onnx_graph, "_EXTERNAL_DATA_LIMIT", 30_000)
    export_bundle(load_checkpoint(checkpoint_path), tmp_path / "out")
    weights = tmp_path / "out" / "query_encoder.onnx.data"
    assert weights.stat().st_mode == weights.with_suffix("").stat().st_mode
    RetrievalEngine.load(tmp_path / "out", provider="cpu", threads=1)
    flip_byte(tmp_path / "out" / "query_encoder.onnx.data")
    with pytest.raises(Exception, match=r"query_encoder\.onnx\.data"):
        Bundle.load(tmp_path / "out")


# -- the command line -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", replay(bundle_path))


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str], *said: str) -> None:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    (error,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in captured.err
    assert captured.out == ""
    for part in said:
        assert part in error


def test_an_existing_bundle_needs_force(
    quick: None, checkpoint_path: Path, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle_path, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused([checkpoint_path, tmp_path / "out"], capsys, "out: exists already", "--force")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert main([str(checkpoint_path), str(tmp_path / "out"), "--force"]) == 0
    assert not (tmp_path / "out" / "notes.txt").exists()
    Bundle.load(tmp_path / "out")
    printed = capsys.readouterr().out
    assert all(spec.name in printed for spec in GRAPHS)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_bundles_alone(quick: None, checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"precious")
    refused([checkpoint_path, tmp_path / "photos", "--force"], capsys, "photos holds files but no manifest.json")
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"precious"


def test_no_space_left(quick: None, checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files_of_at_most(20_000):
        refused([checkpoint_path, tmp_path / "out"], capsys, "out: cannot be written", "File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_cannot_be_written(
    quick: None, checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    refused([checkpoint_path, tmp_path / "file" / "out"], capsys, "cannot be written")

    def denied(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write to read-only folders, so a mode would not do
    refused([checkpoint_path, tmp_path / "out"], capsys, "cannot be written (Permission denied)")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_that_is_none(checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([tmp_path / "none", tmp_path / "out"], capsys, "not a checkpoint")
    shutil.copytree(checkpoint_path, tmp_path / "damaged")
    flip_byte(tmp_path / "damaged" / "model.safetensors")
    refused([tmp_path / "damaged", tmp_path / "out"], capsys, "damaged")
    assert not (tmp_path / "out").exists()
