"""What a graph computes from its weights alone is computed at export, and takes no more room than before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dqe_engine.contracts.graphs import GRAPHS, TARGET_ENCODER, VISION_ENCODER, GraphSpec
from dqe_export.folding import fold_constants, layers_left
from dqe_export.graphs import graph_module
from dqe_training.checkpointing.checkpoint import load_checkpoint

BIG = (0.1 * np.random.default_rng(0).standard_normal((64, 64))).astype(np.float32)


def graph_of(nodes: Sequence[onnx.NodeProto], **weights: np.ndarray) -> onnx.ModelProto:
    """From `x` (64, 64) to `y`."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}0", f"{name}1"]) for name in "xy"]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def folded(proto: onnx.ModelProto) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Operators and weights that are left. What the graph answers must not change."""
    x = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    before = run(proto, x)
    fold_constants(proto)
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(run(proto, x), before, rtol=0, atol=1e-5)
    return [node.op_type for node in proto.graph.node], {w.name: tuple(w.dims) for w in proto.graph.initializer}


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def node(op: str, inputs: str, output: str) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output])


def test_a_chain_of_weights_becomes_one_weight() -> None:
    nodes = [node("MatMul", "a b", "ab"), node("Softmax", "ab", "s"), node("Transpose", "s", "t"), node("Add", "x t", "y")]
    assert folded(graph_of(nodes, a=BIG, b=BIG)) == (["Add"], {"t": (64, 64)})


def test_results_are_those_of_float64_rounded_whatever_the_processor() -> None:
    proto = graph_of([node("MatMul", "a a", "aa"), node("MatMul", "aa a", "aaa"), node("Add", "x aaa", "y")], a=BIG)
    assert folded(proto) == (["Add"], {"aaa": (64, 64)})
    wide = BIG.astype(np.float64)
    assert np.array_equal(numpy_helper.to_array(proto.graph.initializer[0]), (wide @ wide @ wide).astype(np.float32))
    assert not np.array_equal((BIG @ BIG @ BIG), (wide @ wide @ wide).astype(np.float32))


def test_what_has_no_kernel_for_float64_or_is_float64_stays() -> None:
    assert folded(graph_of([node("Erf", "a", "e"), node("Add", "x e", "y")], a=BIG)) == (["Erf", "Add"], {"a": (64, 64)})
    down, up = node("Cast", "w", "d"), node("Cast", "n", "w")
    down.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    up.attribute.append(helper.make_attribute("to", TensorProto.DOUBLE))
    add = node("Add", "x d", "y")
    assert folded(graph_of([up, down, add], n=np.ones(64, np.int64)))[0] == ["Cast", "Cast", "Add"]
    assert folded(graph_of([down, add], w=BIG.astype(np.float64)))[0] == ["Cast", "Add"]


def test_a_weight_is_not_expanded_but_what_it_is_made_of_is_computed() -> None:
    """Even where the weights that fall away would make room for it."""
    nodes = [node("MatMul", "row a", "r"), node("Expand", "r shape", "e"), node("Add", "x e", "y")]
    weights = {"row": BIG[:1], "a": BIG, "shape": np.array([64, 64])}
    assert folded(graph_of(nodes, **weights)) == (["Expand", "Add"], {"shape": (2,), "r": (1, 64)})


def test_a_weight_that_others_read_is_not_stored_twice() -> None:
    nodes = [node("Transpose", "a", "t"), node("MatMul", "x a", "xa"), node("MatMul", "xa t", "y")]
    assert folded(graph_of(nodes, a=BIG)) == (["Transpose", "MatMul", "MatMul"], {"a": (64, 64)})


def test_of_two_results_the_one_that_would_take_more_room_is_not_stored() -> None:
    nodes = [
        node("Transpose", "a", "t"), node("MatMul", "b b", "bb"), node("ReduceMax", "bb", "m"),
        node("MatMul", "x a", "xa"), node("MatMul", "xa t", "xat"), node("Add", "xat m", "y"),
    ]  # fmt: skip
    operators, left = folded(graph_of(nodes, a=BIG, b=BIG[:40, :40]))
    assert operators == ["Transpose", "MatMul", "MatMul", "Add"]
    assert left == {"a": (64, 64), "m": (1, 1)}


def test_small_shapes_may_grow() -> None:
    nodes = [node("Concat", "n n", "shape"), node("Reshape", "x shape", "y")]
    nodes[0].attribute.append(helper.make_attribute("axis", 0))
    assert folded(graph_of(nodes, n=np.array([64]))) == (["Reshape"], {"shape": (2,)})


def test_outputs_and_graphs_without_constants_stay() -> None:
    assert folded(graph_of([node("Relu", "a", "y")], a=BIG)) == (["Relu"], {"a": (64, 64)})
    assert folded(graph_of([node("MatMul", "x a", "y")], a=BIG)) == (["MatMul"], {"a": (64, 64)})


@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
def test_exported_graphs_are_folded(spec: GraphSpec, bundle_path: Path) -> None:
    proto = onnx.load(bundle_path / spec.file)
    weights = {tensor.name for tensor in proto.graph.initializer}
    assert not [node.name for node in proto.graph.node if weights.issuperset(node.input)]
    before = proto.SerializeToString(deterministic=True)
    fold_constants(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_folded_layers_are_not_there_to_be_rounded(bundle_path: Path, checkpoint_path: Path) -> None:
    """The Q-Former's first self-attention over its queries, which are the same for all images."""
    module = graph_module(TARGET_ENCODER, load_checkpoint(checkpoint_path).model)
    left = layers_left(bundle_path / TARGET_ENCODER.file, module)
    first = {f"model.qformer.encoder.layer.0.attention.{name}" for name in ("attention.query", "attention.value", "output.dense")}
    assert first <= {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    assert not first & left
    assert {"model.vision_projection", "model.qformer.encoder.layer.0.crossattention.output.dense"} <= left


def test_the_vision_tower_is_exported_with_plain_attention(bundle_path: Path) -> None:
    """`scaled_dot_product_attention` comes apart into more, with slices of the sizes of its operands."""
    operators = [node.op_type for node in onnx.load(bundle_path / VISION_ENCODER.file).graph.node]
    assert "Softmax" in operators
    assert "Slice" not in operators
