"""8-bit matrix products whose rows know nothing of each other, in ONNX's own operators, with sums that are exact on every processor.

A row x of activations has a step of its own, of which its largest magnitude has 127, and so has a column w of weights, with 64:

    x·w ≈ r·s·Σ (a - 128)·q,   a = round(x / r) + 128 in 1 to 255,   r = max|x| / 127,   q = round(w / s) in -64 to 64,   s = max|w| / 64

So an answer depends neither on its neighbours in the batch nor on padding. The sum is of whole numbers, the same on every processor: AVX2
without VNNI adds pairs of products in 16 bits, and 2·255·64 = 32,640 still fits, where weights of 8 bits (2·255·127) overflow in silence.
That costs one bit of the weights; scaling all rows alike, as ONNX Runtime's own scheme does, costs more (docs/export.md has the table).
Infinite activations and NaN among the weights stay visible in the result; a NaN among the activations may become a number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dqe_engine.errors import ExportError

WEIGHT_STEPS = 64
"""Largest magnitude of a weight: the largest of which two, times 255, fit into 16 bits with sign."""
ACTIVATION_STEPS = 127
_ZERO = 128
_WEIGHT = {"MatMul": 1, "Gather": 0}
"""Which input of an operator is the constant that takes 8 bits."""
_INTEGER_PRODUCTS = frozenset({
    "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm", "QAttention", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM", "MatMulNBits",
})  # fmt: skip
"""Of ONNX and of ONNX Runtime's own domain: those that it may multiply in 8 bits."""
_LEAST = 1e-30
"""The smallest step: of a row of zeros, or of numbers that small."""


def quantise_rows(proto: onnx.ModelProto, *, keep: Collection[str] = ()) -> None:
    """Replace, in place, each product of tokens with a constant matrix, and each table that an input looks up, but for the nodes named
    in `keep`.

    `Gemm` stays: its rows are one a question, summed over tokens, and float32 sums depend on the batch in the last place. Rounded to 8
    bits, that becomes a whole step now and then; and such products are little work.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    writer = _Writer()
    for node in graph.node:
        weight = constants.get(node.input[_WEIGHT[node.op_type]]) if node.op_type in _WEIGHT else None
        if node.name in keep or weight is None or len(weight.dims) != 2 or weight.data_type != onnx.TensorProto.FLOAT:
            writer.nodes.append(node)
        elif node.op_type == "MatMul":
            writer.multiply(node, weight.name, numpy_helper.to_array(weight))
        elif node.input[1] in inputs and not any(attribute.name == "axis" and attribute.i for attribute in node.attribute):
            writer.look_up(node, weight.name, numpy_helper.to_array(weight))
        else:
            writer.nodes.append(node)
    used = {name for node in writer.nodes for name in node.input} | {value.name for value in graph.output}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(writer.nodes)
    graph.initializer.extend([*left, *writer.constants.values()])


def quantise_columns(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix (K, N) as `q` (K, N) in -64 to 64 and steps (N,): matrix ≈ q * steps."""
    steps = np.maximum(np.abs(matrix).max(axis=0, initial=0) / WEIGHT_STEPS, np.float32(_LEAST))
    with np.errstate(invalid="ignore"):  # NaN: the column's step carries it
        return np.rint(matrix / steps).astype(np.int8), steps.astype(np.float32)


def may_saturate(proto: onnx.ModelProto) -> list[str]:
    """Names of 8-bit products that are not known to be exact on a processor which adds pairs of them in 16 bits, whatever the activations.

    The worst case of every `MatMulInteger` with constant weights is looked at; any other of `_INTEGER_PRODUCTS` counts as one that may. So
    nothing depends on the processor that ran a check. Subgraphs are not looked at, which our graphs have none of; nor are pairs of
    QuantizeLinear and DequantizeLinear around a product: `OnnxSession` multiplies those in float32, other programs may not.
    """
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    return [node.name for node in proto.graph.node if node.op_type in _INTEGER_PRODUCTS and not _fits(node, values)]


def _fits(node: onnx.NodeProto, values: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether sums of two products of this one fit into 16 bits."""
    weights = values.get(node.input[1]) if node.op_type == "MatMulInteger" else None
    if weights is None:
        return False
    if weights.data_type == onnx.TensorProto.UINT8:  # widened before they are multiplied
        return True
    largest = int(np.abs(numpy_helper.to_array(weights).astype(np.int32)).max(initial=0))
    return 2 * 255 * largest <= np.iinfo(np.int16).max


@dataclass
class _Writer:
    """The graph as it grows: `rows` remembers which activations are in 8 bits already, since query, key and value share theirs."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)

    def multiply(self, node: onnx.NodeProto, weight: str, matrix: NDArray[np.float32]) -> None:
        rows, row_step = self.rows.get(node.input[0]) or self._quantise(node.input[0])
        columns, column_steps = self._store(weight, *quantise_columns(matrix))
        name = f"{node.output[0]}_int8"
        self._add("MatMulInteger", [rows, columns, self._constant("int8_zero", np.uint8(_ZERO))], f"{name}_sum")
        self._add("Cast", [f"{name}_sum"], f"{name}_float", to=onnx.TensorProto.FLOAT)
        # Not Mul(Cast, Mul(steps, step)): ONNX Runtime 1.32 fuses that into MatMulIntegerToFloat, which takes one scale for all rows.
        self._add("Mul", [f"{name}_float", column_steps], f"{name}_columns")
        self._add("Mul", [f"{name}_columns", row_step], node.output[0])

    def look_up(self, node: onnx.NodeProto, weight: str, table: NDArray[np.float32]) -> None:
        """A table's rows are scaled one by one, and stay a table: all 8 bits, since they are not multiplied."""
        steps = np.maximum(np.abs(table).max(axis=1, keepdims=True, initial=0) / 127, np.float32(_LEAST)).astype(np.float32)
        stored, name = self._store(weight, np.rint(table / steps).astype(np.int8), steps), f"{node.output[0]}_int8"
        for values, part in zip(stored, ("row", "step"), strict=True):
            self._add("Gather", [values, node.input[1]], f"{name}_{part}")
        self._add("Cast", [f"{name}_row"], f"{name}_float", to=onnx.TensorProto.FLOAT)
        self._add("Mul", [f"{name}_float", f"{name}_step"], node.output[0])

    def _quantise(self, source: str) -> tuple[str, str]:
        """Names of `source` in 8 bits and of the steps of its rows."""
        name = f"{source}_int8"
        self._add("Abs", [source], f"{name}_abs")
        self._add("ReduceMax", [f"{name}_abs", self._constant("int8_axis", np.array([-1]))], f"{name}_largest", keepdims=1)
        self._add("Mul", [f"{name}_largest", self._constant("int8_step", np.float32(1 / ACTIVATION_STEPS))], f"{name}_part")
        self._add("Max", [f"{name}_part", self._constant("int8_least", np.float32(_LEAST))], f"{name}_step")
        self._add("Div", [source, f"{name}_step"], f"{name}_steps")
        ends = self._constant("int8_one", np.float32(1)), self._constant("int8_zero", np.uint8(_ZERO))
        self._add("QuantizeLinear", [f"{name}_steps", *ends], f"{name}_rows")
        self.rows[source] = f"{name}_rows", f"{name}_step"
        return self.rows[source]

    def _store(self, weight: str, values: NDArray[np.int8], steps: NDArray[np.float32]) -> tuple[str, str]:
        """Under the names that ONNX Runtime's tools would give them."""
        return self._constant(f"{weight}_quantized", values), self._constant(f"{weight}_scale", steps)

    def _add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **attributes))

    def _constant(self, name: str, value: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(value), name)
        if self.constants.setdefault(name, tensor) != tensor:
            raise ExportError(f"{name}: one matrix is looked up and multiplied; give each its own, or export in another precision")
        return name
