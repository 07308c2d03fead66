"""Multi-head attention in a graph, in the one form that a GPU's compiler fuses (docs/tensorrt.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import onnx
from onnx import helper


class AttentionBlock(NamedTuple):
    """Names of nodes. `first` is the product of scaled queries and keys, `mask` the addition to it, if any, `last` the product with the
    values; nothing else is between `scale` and `last`, and nothing else reads what is."""

    scale: str
    first: str
    mask: str | None
    softmax: str
    last: str


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

    for softmax in graph.node:
        if softmax.op_type != "Softmax" or _attribute(softmax, "axis", -1) not in (-1, 3):
            continue
        mask = maker(softmax.input[0], "Add")
        first = maker(mask.input[0] if mask is not None else softmax.input[0], "MatMul")
        scale = maker(first.input[0], "Mul") if first is not None else None
        keys = maker(first.input[1], "Transpose") if first is not None else None
        after = readers.get(softmax.output[0], [])
        if first is None or scale is None or keys is None or len(after) != 1:
            continue
        last = after[0]
        if scale.input[1] in constants and last.op_type == "MatMul" and last.input[0] == softmax.output[0]:
            yield AttentionBlock(scale.name, first.name, None if mask is None else mask.name, softmax.name, last.name)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    found = [helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]
    return int(found[0]) if found else default
