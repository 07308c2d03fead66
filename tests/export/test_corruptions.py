"""Wrong exports, one small change each, in every precision: the gate refuses them all, and passes what is right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from support.corruptions import BUNDLE, CONVERTED, TRACED, Corruption, refusal_of_bundle, refusal_of_converted, refusal_of_traced
from support.graph_edits import after
from support.tiny_training import make_model, model_config

from dqe_engine.contracts.graphs import GRAPHS, QUERY_ENCODER, TARGET_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import Precision
from dqe_engine.errors import ParityError
from dqe_export import onnx_graph, parity, word_table
from dqe_export.calibration import EvaluationData
from dqe_export.converted import check_conversion
from dqe_export.differences import TOLERANCES, check_range
from dqe_export.onnx_graph import save_graph
from dqe_export.precision import Lower, convert
from dqe_training.checkpointing.checkpoint import Checkpoint, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
CONVERSIONS: tuple[Lower, ...] = ("float16", "int8")


@pytest.fixture(scope="module")
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    return load_checkpoint(checkpoint_path)


@pytest.fixture(scope="module")
def sources(bundle_path: Path, upstream_path: Path) -> dict[Precision, Path]:
    """The float32 graphs that each precision is made from."""
    return {"float32": bundle_path, "float16": bundle_path, "int8": upstream_path, "int8-static": upstream_path}


@pytest.fixture(scope="module")
def converted(sources: dict[Precision, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    """The graphs in each lower precision."""
    folders: dict[Precision, Path] = {}
    for precision in CONVERSIONS:
        folders[precision], work = tmp_path_factory.mktemp(precision), tmp_path_factory.mktemp("float32")
        for spec in GRAPHS:
            shutil.copy(sources[precision] / spec.file, work)
            convert(work / spec.file, folders[precision] / spec.file, precision)
    return folders


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", TRACED)
def test_a_corrupted_graph_is_refused(
    name: str, precision: Precision, checkpoint: Checkpoint, sources: dict[Precision, Path], garments: Path, tmp_path: Path
) -> None:
    data = EvaluationData.open(garments) if precision == "int8-static" else None
    said = refusal_of_traced(TRACED[name], precision, checkpoint, sources[precision], tmp_path, data)
    assert said is not None, "it passed"
    assert TRACED[name].graph.name in said
    assert TRACED[name].said in said


@pytest.mark.parametrize("precision", CONVERSIONS)
@pytest.mark.parametrize("name", CONVERTED)
def test_a_conversion_gone_wrong_is_refused(
    name: str,
    precision: Precision,
    checkpoint: Checkpoint,
    sources: dict[Precision, Path],
    converted: dict[Precision, Path],
    tmp_path: Path,
) -> None:
    said = refusal_of_converted(CONVERTED[name], precision, checkpoint.model, sources[precision], converted[precision], tmp_path)
    assert said is not None, "it passed"
    assert CONVERTED[name].said in said


def _products(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Two 8-bit products whose matrices have one shape."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    products = [node for node in proto.graph.node if node.op_type == "MatMulInteger"]
    first = next(a for a in products if sum(shapes[a.input[1]] == shapes[b.input[1]] for b in products) > 1)
    return [node for node in products if shapes[node.input[1]] == shapes[first.input[1]]][:2]


def _other_weights(proto: onnx.ModelProto, change: Callable[[NDArray[np.int8]], NDArray[np.int8]]) -> None:
    """Under another name; the right ones stay, unused."""
    node = _products(proto)[0]
    right = numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == node.input[1]))
    proto.graph.initializer.append(numpy_helper.from_array(change(right), "others"))
    node.input[1] = "others"


def _swapped_products(proto: onnx.ModelProto) -> None:
    first, second = _products(proto)
    first.input[1], second.input[1] = second.input[1], first.input[1]


def _swapped_rows(proto: onnx.ModelProto) -> None:
    first, second = (node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.output[0] in _fed(proto))
    first.output[0], second.output[0] = second.output[0], first.output[0]


def _fed(proto: onnx.ModelProto) -> list[str]:
    """The activations of the first two products that do not share theirs."""
    return list(dict.fromkeys(node.input[0] for node in proto.graph.node if node.op_type == "MatMulInteger"))[:2]


@pytest.mark.parametrize(
    "edit",
    [
        partial(_other_weights, change=np.zeros_like),
        partial(_other_weights, change=lambda right: (right * 0.9).astype(np.int8)),
        partial(_other_weights, change=lambda right: np.ascontiguousarray(right.T)),
        _swapped_products,
        _swapped_rows,
    ],
    ids=["zeros", "all weights × 0.9", "transposed", "two products' weights swapped", "two products' inputs swapped"],
)
def test_products_of_other_tensors_are_refused(
    edit: Callable[[onnx.ModelProto], None], sources: dict[Precision, Path], converted: dict[Precision, Path], tmp_path: Path
) -> None:
    """Numbers do not see all of these: rounding may move an output as far."""
    proto = onnx.load(converted["int8"] / QUERY_ENCODER.file)
    edit(proto)
    onnx.save(proto, tmp_path / QUERY_ENCODER.file)
    with pytest.raises(ParityError, match="are not what makes"):
        check_conversion(QUERY_ENCODER, sources["int8"] / QUERY_ENCODER.file, tmp_path / QUERY_ENCODER.file)


@pytest.mark.parametrize("name", BUNDLE)
def test_a_bundle_that_reads_otherwise_is_refused(name: str, checkpoint: Checkpoint, bundle_path: Path, tmp_path: Path) -> None:
    edit, wanted = BUNDLE[name]
    said = refusal_of_bundle(edit, checkpoint, bundle_path, tmp_path)
    assert said is not None, "it passed"
    assert said.startswith(wanted)
    assert "\n" not in said


@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
@pytest.mark.parametrize("precision", ["float32", *CONVERSIONS])
def test_an_honest_graph_passes(
    spec: GraphSpec, precision: Precision, checkpoint: Checkpoint, sources: dict[Precision, Path], tmp_path: Path
) -> None:
    honest = Corruption(spec, lambda proto, model: None, "")
    assert refusal_of_traced(honest, precision, checkpoint, sources[precision], tmp_path, None) is None


def test_an_honest_bundle_passes(checkpoint: Checkpoint, bundle_path: Path, tmp_path: Path) -> None:
    assert refusal_of_bundle(lambda directory: None, checkpoint, bundle_path, tmp_path) is None


# -- what each part of the gate sees, on arrays and graphs made for it ---------------------------------------------------------


@pytest.mark.parametrize("precision", TOLERANCES)
def test_lengths_and_signs_are_held(precision: Precision) -> None:
    tolerance = TOLERANCES[precision]
    unit = np.eye(3, dtype=np.float32)[None]
    check = partial(check_range, "graph: ", reference="PyTorch", tolerance=tolerance, where="here")
    check("target_tokens", unit, unit)
    check("sub_queries", np.zeros_like(unit), np.zeros_like(unit))  # a model without attribute heads has none
    for wrong in (0.998 * unit, 1.002 * unit, np.zeros_like(unit), unit * np.nan):
        with pytest.raises(ParityError, match="graph: target_tokens differs from PyTorch in length"):
            check("target_tokens", wrong, unit)
    with pytest.raises(ParityError, match="sub_queries differs from PyTorch in length"):
        check("sub_queries", unit, np.zeros_like(unit))
    check("fused_text", 2 * unit, unit)  # of no particular length
    check("attribute_weights", unit, unit)
    for wrong in (unit - 1e-6, unit * np.nan):
        with pytest.raises(ParityError, match="graph: attribute_weights has"):
            check("attribute_weights", wrong, unit)


def test_texts_of_every_length_and_word_are_tried(checkpoint: Checkpoint) -> None:
    model = checkpoint.model
    words, longest = model.embeddings.word_embeddings.num_embeddings, model.config.qformer.max_text_length
    assert longest > max(shape["text_length"] for shape in parity.SHAPES)
    cases = list(parity.Reference(QUERY_ENCODER, model).cases())
    assert cases[-1].shape["text_length"] == longest
    assert set(cases[-1].inputs["input_ids"].ravel()) == set(range(words))
    assert cases[-1].inputs["attention_mask"][0].all()
    assert {axis for shape in parity.shapes_of(TARGET_ENCODER, model) for axis in shape} == {"batch"}
    large = make_model(model_config(max_text_length=512), vocab_size=30_523)
    assert parity.shapes_of(QUERY_ENCODER, large)[-1] == {"batch": 2, "text_length": 512}


def test_a_word_beyond_those_tried_in_texts_is_seen(tmp_path: Path, checkpoint: Checkpoint, bundle_path: Path) -> None:
    """The lookup alone is asked for all words, whatever the size of the vocabulary: here three at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_table, "_AT_ONCE", 3)
        found = list(word_table.looked_up(checkpoint.model, bundle_path / QUERY_ENCODER.file))
    assert len(found) == -(-checkpoint.model.embeddings.word_embeddings.num_embeddings // 3)
    np.testing.assert_array_equal(
        np.concatenate([words for words, _ in found]), checkpoint.model.embeddings.word_embeddings.weight.detach().numpy()
    )
    proto = onnx.load(bundle_path / QUERY_ENCODER.file)
    after("word_embeddings", ("Cast", ["attention_mask"]), ("ReduceMax", ["_"]), ("Mul", ["$", "_"]))(proto, checkpoint.model)
    next(node for node in proto.graph.node if node.op_type == "Cast" and node.output[0].startswith("word_embeddings")).attribute.append(
        onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT)
    )
    onnx.save(proto, tmp_path / QUERY_ENCODER.file)
    with pytest.raises(ParityError, match="word_embeddings depends on attention_mask, not on the words alone"):
        list(word_table.looked_up(checkpoint.model, tmp_path / QUERY_ENCODER.file))


def test_weights_beside_a_graph_are_read_too(
    checkpoint: Checkpoint, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "_EXTERNAL_DATA_LIMIT", 10_000)
    (tmp_path / "lower").mkdir()
    save_graph(onnx.load(bundle_path / QUERY_ENCODER.file), tmp_path / QUERY_ENCODER.file)
    assert (tmp_path / f"{QUERY_ENCODER.file}.data").is_file()
    assert [np.array_equal(*pair) for pair in word_table.looked_up(checkpoint.model, tmp_path / QUERY_ENCODER.file)] == [True]
    proto = onnx.load(tmp_path / QUERY_ENCODER.file)
    save_graph(proto, tmp_path / "lower" / QUERY_ENCODER.file)
    check_conversion(QUERY_ENCODER, tmp_path / QUERY_ENCODER.file, tmp_path / "lower" / QUERY_ENCODER.file)
    proto = onnx.load(tmp_path / QUERY_ENCODER.file)
    CONVERTED["the query's bias dropped"].edit(proto, checkpoint.model)
    save_graph(proto, tmp_path / "lower" / QUERY_ENCODER.file)
    with pytest.raises(ParityError, match=r"text_projection\.bias are others"):
        check_conversion(QUERY_ENCODER, tmp_path / QUERY_ENCODER.file, tmp_path / "lower" / QUERY_ENCODER.file)


def test_a_bias_that_nothing_adds_any_more_is_seen(checkpoint: Checkpoint, bundle_path: Path, tmp_path: Path) -> None:
    proto = onnx.load(bundle_path / TARGET_ENCODER.file)
    add = next(node for node in proto.graph.node if "model.vision_projection.bias" in node.input)
    kept = next(name for name in add.input if name != "model.vision_projection.bias")
    for node in proto.graph.node:
        node.input[:] = [kept if name == add.output[0] else name for name in node.input]
    proto.graph.node.remove(add)
    onnx.save(proto, tmp_path / TARGET_ENCODER.file)
    with pytest.raises(ParityError, match=r"vision_projection\.bias are not used any more after the conversion"):
        check_conversion(TARGET_ENCODER, bundle_path / TARGET_ENCODER.file, tmp_path / TARGET_ENCODER.file)
