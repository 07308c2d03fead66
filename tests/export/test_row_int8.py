"""8-bit products by rows: exact sums on every processor, answers that depend on nothing but their own row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dqe_engine.errors import ExportError
from dqe_export import row_int8
from dqe_export.precision import convert
from dqe_export.row_int8 import ACTIVATION_STEPS, WEIGHT_STEPS, may_saturate, quantise_columns, quantise_rows

Floats = NDArray[np.float32]


def product(weights: Floats) -> onnx.ModelProto:
    """x (b, l, K) times `weights` (K, N)."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    sizes = zip("xy", weights.shape, strict=True)
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", "l", size]) for name, size in sizes]
    graph = helper.make_graph([node], "product", value[:1], value[1:], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def quantised(proto: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    quantise_rows(proto, **options)
    onnx.checker.check_model(proto)
    return proto


def run(proto: onnx.ModelProto, x: Floats, *, threads: int = 1) -> Floats:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Floats = session.run(None, {"x": x})[0]
    return found


def by_the_formula(x: Floats, weights: Floats) -> NDArray[np.float64]:
    """The docstring of `row_int8`, in whole numbers."""
    step = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / ACTIVATION_STEPS), np.float32(1e-30))
    q, steps = quantise_columns(weights)
    return (np.rint(x / step).astype(np.int64) @ q.astype(np.int64)) * steps.astype(np.float64) * step.astype(np.float64)


class MatMulInteger(OpRun):
    """As processors with AVX2 and without VNNI compute it: neighbouring products are added in 16 bits, which saturate."""

    op_domain = ""

    def _run(self, a: NDArray[np.uint8], b: NDArray[np.int8], zero: NDArray[np.uint8]) -> tuple[NDArray[np.int32]]:
        odd = [(0, b.shape[0] % 2)]
        a, b = np.pad(a, [(0, 0)] * (a.ndim - 1) + odd).astype(np.int32), np.pad(b, [*odd, (0, 0)]).astype(np.int32)
        first, second = a[..., 0::2, None] * b[0::2], a[..., 1::2, None] * b[1::2]  # (..., K / 2, N)
        pairs = np.clip(first + second, np.iinfo(np.int16).min, np.iinfo(np.int16).max)
        return ((pairs.sum(axis=-2) - int(zero) * b.sum(axis=0)).astype(np.int32),)


AWKWARD = [(1, 1), (2, 19), (3, 111), (7, 64), (5, 257)]


@pytest.mark.parametrize(("rows", "width"), AWKWARD)
def test_the_graph_is_the_formula(rows: int, width: int, rng: np.random.Generator) -> None:
    weights = rng.standard_normal((width, 13)).astype(np.float32)
    x = rng.standard_normal((rows, 3, width)).astype(np.float32)
    np.testing.assert_allclose(run(quantised(product(weights)), x), by_the_formula(x, weights), rtol=2e-6, atol=2e-6)


def test_rounding_is_within_half_a_step(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((50, 9)).astype(np.float32)
    weights[:, 4] = 0
    q, steps = quantise_columns(weights)
    assert np.abs(q).max() == WEIGHT_STEPS
    assert (np.abs(q * steps - weights) <= steps / 2 * (1 + 1e-6)).all()
    assert (q[:, 4] == 0).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 70), largest=st.sampled_from([1e-20, 1e-3, 1.0, 300.0, 1e20]))
def test_a_processor_that_saturates_computes_the_same(seed: int, width: int, largest: float) -> None:
    """The worst weights there are among them: all at the end of their range, so that every pair sums to as much as it can."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([-1.0, 1.0], (width, 5)).astype(np.float32)
    weights[:, 1:3] *= rng.standard_normal((width, 2)).astype(np.float32)
    x = (largest * rng.choice([1.0, -1.0, 0.5], (2, 3, width))).astype(np.float32)
    proto = quantised(product(weights))
    exact, saturating = (ReferenceEvaluator(proto, new_ops=operators).run(None, {"x": x})[0] for operators in ([], [MatMulInteger]))
    np.testing.assert_array_equal(saturating, exact)
    np.testing.assert_allclose(run(proto, x), exact, rtol=1e-6, atol=0)


def test_the_emulation_sees_what_overflows(rng: np.random.Generator) -> None:
    """With 8 bits of the weights it finds the fault that the scheme avoids, and so does the proof."""
    x, weights = np.ones((1, 1, 64), np.float32), np.ones((64, 5), np.float32)
    proto = quantised(product(weights))
    assert may_saturate(proto) == []
    (stored,) = (t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8)
    stored.CopyFrom(numpy_helper.from_array(np.full((64, 5), 127, np.int8), stored.name))
    assert may_saturate(proto) == [node.name for node in proto.graph.node if node.op_type == "MatMulInteger"]
    exact, saturating = (ReferenceEvaluator(proto, new_ops=operators).run(None, {"x": x})[0] for operators in ([], [MatMulInteger]))
    assert np.abs(saturating - exact).max() > 0.4 * np.abs(exact).max()


def test_graphs_that_may_saturate_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    onnx.save(product(rng.standard_normal((8, 3)).astype(np.float32)), tmp_path / "source.onnx")
    convert(tmp_path / "source.onnx", tmp_path / "right.onnx", "int8")
    monkeypatch.setattr(row_int8, "WEIGHT_STEPS", 127)
    with pytest.raises(ExportError, match="would overflow on processors without VNNI"):
        convert(tmp_path / "source.onnx", tmp_path / "wrong.onnx", "int8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["right.onnx", "source.onnx"]


def test_rows_know_nothing_of_each_other(rng: np.random.Generator) -> None:
    """To the bit: alone, in any company and order, beside rows a million times as large, and with any number of threads."""
    proto = quantised(product(rng.standard_normal((96, 33)).astype(np.float32)))
    x = rng.standard_normal((40, 1, 96)).astype(np.float32)
    x[::3] *= 1e6
    together = run(proto, x)
    for count in (1, 7, 32):
        parts = [run(proto, x[start : start + count]) for start in range(0, 40, count)]
        np.testing.assert_array_equal(np.concatenate(parts), together)
    order = rng.permutation(40)
    np.testing.assert_array_equal(run(proto, x[order], threads=2), together[order])


def test_awkward_rows(rng: np.random.Generator) -> None:
    """Zeros stay zeros, very large and very small numbers keep their direction; infinities, and NaN among the weights, are not hidden."""
    weights = rng.standard_normal((16, 4)).astype(np.float32)
    x = np.zeros((5, 1, 16), np.float32)
    x[1], x[2], x[3], x[4] = 3e30, 1e-25, np.eye(16, dtype=np.float32)[3], rng.standard_normal(16)
    x[4, 0, 5] = np.inf
    found = run(quantised(product(weights)), x)
    assert (found[0] == 0).all()
    exact = (x[1:4].astype(np.float64) @ weights).astype(np.float64)
    assert (np.abs(found[1:4] - exact) <= 0.1 * np.abs(exact).max(axis=-1, keepdims=True)).all()
    assert not np.isfinite(found[4]).any()
    weights[2, 1] = np.nan
    found = run(quantised(product(weights)), x[2:4])
    assert np.isnan(found[..., 1]).all()
    assert np.isfinite(found[..., [0, 2, 3]]).all()


def test_tables_that_inputs_look_up_are_scaled_by_rows(rng: np.random.Generator) -> None:
    table = (rng.standard_normal((30, 8)) * 10.0 ** rng.integers(-3, 3, (30, 1))).astype(np.float32)
    node = helper.make_node("Gather", ["table", "ids"], ["y"], name="look up")
    ids, y = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"]), helper.make_tensor_value_info("y", 1, ["n", 8])
    graph = helper.make_graph([node], "table", [ids], [y], [numpy_helper.from_array(table, "table")])
    proto = quantised(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))
    found = ReferenceEvaluator(proto).run(None, {"ids": np.arange(30)})[0]
    assert (np.abs(found - table) <= np.abs(table).max(axis=1, keepdims=True) / 253).all()
    assert not any(t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2 and t.dims[1] == 8 for t in proto.graph.initializer)


def test_products_of_one_input_share_its_rows_and_kept_ones_stay(rng: np.random.Generator) -> None:
    weights = [numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), f"w{i}") for i in range(3)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=f"product {i}") for i in range(3)]
    value = [helper.make_tensor_value_info(name, 1, ["b", 8]) for name in ("x", "y0", "y1", "y2")]
    graph = helper.make_graph(nodes, "three", value[:1], value[1:], weights)
    proto = quantised(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), keep=["product 2"])
    kinds = [node.op_type for node in proto.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("MatMulInteger"), kinds.count("MatMul")) == (1, 2, 1)
    assert [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2] == ["w2"]


def test_products_of_pooled_rows_stay_in_float32(rng: np.random.Generator) -> None:
    """What was summed over tokens differs between batches in the last place, and may not be rounded to 8 bits after that."""
    weights = numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), "w")
    value = [helper.make_tensor_value_info(name, 1, ["b", 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Gemm", ["x", "w"], ["y"], name="pooled")], "pooled", value[:1], value[1:], [weights])
    proto = quantised(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))
    assert [node.op_type for node in proto.graph.node] == ["Gemm"]


def test_a_matrix_in_two_roles_is_refused(rng: np.random.Generator) -> None:
    table = numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), "w")
    nodes = [helper.make_node("Gather", ["w", "ids"], ["x"], name="look up"), helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    ids, y = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"]), helper.make_tensor_value_info("y", 1, ["n", 8])
    graph = helper.make_graph(nodes, "both", [ids], [y], [table])
    with pytest.raises(ExportError, match="one matrix is looked up and multiplied"):
        quantise_rows(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


@pytest.mark.parametrize("kind", ["MatMulNBits", "QLinearMatMul", "DynamicQuantizeMatMul"])
def test_what_is_not_known_to_fit_may_saturate(kind: str) -> None:
    node = helper.make_node(kind, ["x", "w"], ["y"], name="product")
    assert may_saturate(helper.make_model(helper.make_graph([node], "unknown", [], []))) == ["product"]


def test_weights_that_are_computed_may_saturate() -> None:
    node = helper.make_node("MatMulInteger", ["x", "computed"], ["y"], name="product")
    assert may_saturate(helper.make_model(helper.make_graph([node], "computed", [], []))) == ["product"]
