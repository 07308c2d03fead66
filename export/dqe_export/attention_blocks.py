"""Multi-head attention in a graph, in the one form that a GPU's compiler fuses (docs/tensorrt.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import onnx
from onnx import helper


class AttentionBlock(NamedTuple):
    """Names of nodes. `first` is the product of scaled queries and keys, `mask` the addition to it, if any, `last` the product with the
    values; nothing else is between `scale` and `last`, and nothing else reads what is, but for 8 bits: there, all four inputs of the two
    products come through a pair of QuantizeLinear and DequantizeLinear."""

    scale: str
    first: str
    mask: str | None
    softmax: str
    last: str
    quantised: bool


def attention_blocks(graph: onnx.GraphProto) -> Iterator[AttentionBlock]:
    """Every (queries * constant) @ transposed keys [+ mask] -> softmax over the keys -> @ values of `graph`, in its order."""
    made = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in graph.initializer if not tensor.dims}

    def maker(name: str, kind: str) -> onnx.NodeProto | None:
        """The node of this kind that makes the tensor `name` for one reader alone."""
        node = made.get(name)
        return node if node is not None and node.op_type == kind and len(readers[name]) == 1 else None

    def reader(name: str, kind: str) -> onnx.NodeProto | None:
        """The node of this kind that alone reads `name`, as its first input."""
        after = readers.get(name, [])
        return after[0] if len(after) == 1 and after[0].op_type == kind and after[0].input[0] == name else None

    def unquantised(name: str) -> str | None:
        """What the pair that makes `name` was given."""
        after = maker(name, "DequantizeLinear")
        before = maker(after.input[0], "QuantizeLinear") if after is not None else None
        return before.input[0] if before is not None else None

    for softmax in graph.node:
        if softmax.op_type != "Softmax" or _attribute(softmax, "axis", -1) not in (-1, 3):
            continue
        mask = maker(softmax.input[0], "Add")
        first = maker(mask.input[0] if mask is not None else softmax.input[0], "MatMul")
        if first is None:
            continue
        pair = reader(softmax.output[0], "QuantizeLinear")
        pair = reader(pair.output[0], "DequantizeLinear") if pair is not None else None
        last = reader((softmax if pair is None else pair).output[0], "MatMul")
        if last is None:
            continue
        given = [unquantised(name) for name in (*first.input, last.input[1])]
        if any((name is None) != (pair is None) for name in given):
            continue
        queries, keys = (name or plain for name, plain in zip(given, first.input, strict=False))
        scale = maker(queries, "Mul")
        if scale is not None and scale.input[1] in constants and maker(keys, "Transpose") is not None:
            mask_name = None if mask is None else mask.name
            yield AttentionBlock(scale.name, first.name, mask_name, softmax.name, last.name, quantised=pair is not None)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    found = [helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]
    return int(found[0]) if found else default
