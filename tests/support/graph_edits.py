"""Edits of an ONNX graph that make it another: weights found by their values, nodes by their operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from support.replayed_export import drop_mask

from dqe_training.model import DQEModel

GraphEdit = Callable[[onnx.ModelProto, DQEModel], None]
Array = NDArray[Any]


# -- weights, found by their values, so that it does not matter what an exporter calls them --------------------------------------


def change(proto: onnx.ModelProto, model: DQEModel, parameter: str, edit: Callable[[Array], Array]) -> None:
    """Change the constant that holds a parameter of the model, transposed or not, as if the parameter were another."""
    wanted = dict(model.named_parameters())[parameter].detach().numpy()
    found = 0
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        for turned in (False, True):
            value = values.T if turned else values
            if value.shape == wanted.shape and np.allclose(value.astype(np.float32), wanted, rtol=1e-3, atol=1e-6):
                changed = edit(value.astype(np.float32)).astype(values.dtype)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed.T if turned else changed), tensor.name))
                found += 1
                break
    assert found, f"no constant of the graph is {parameter}"


def parameter(name: str, edit: Callable[[Array], Array]) -> GraphEdit:
    return lambda proto, model: change(proto, model, name, edit)


def zeroed(values: Array) -> Array:
    return np.zeros_like(values)


def reversed_rows(values: Array) -> Array:
    return values[::-1].copy()


def row_set(rows: slice, value: float) -> Callable[[Array], Array]:
    def edit(values: Array) -> Array:
        changed = values.copy()
        changed[rows] = value
        return changed

    return edit


def row_moved(row: int, amount: float) -> Callable[[Array], Array]:
    def edit(values: Array) -> Array:
        changed = values.copy()
        changed[row] += amount
        return changed

    return edit


def nudged(amount: float) -> Callable[[Array], Array]:
    def edit(values: Array) -> Array:
        changed = values.copy()
        changed.flat[0] += amount
        return changed

    return edit


def mixed(values: Array) -> Array:
    """A tenth of the second head in the first."""
    changed = values.copy()
    changed[0] = 0.9 * values[0] + 0.1 * values[1]
    return changed


def both(*edits: GraphEdit) -> GraphEdit:
    def edit(proto: onnx.ModelProto, model: DQEModel) -> None:
        for one in edits:
            one(proto, model)

    return edit


def heads(edit: Callable[[Array], Array]) -> GraphEdit:
    return both(*(parameter(f"attribute_heads.{name}", edit) for name in ("seeds", "projection")))


def presence(edit: Callable[[Array], Array]) -> GraphEdit:
    return both(*(parameter(f"attribute_heads.presence.2.{name}", edit) for name in ("weight", "bias")))


def swapped(proto: onnx.ModelProto, model: DQEModel) -> None:
    """The first two of several matrices with equally many numbers change places, each in the other's shape."""
    sizes: dict[int, list[onnx.TensorProto]] = {}
    for tensor in proto.graph.initializer:
        if len(tensor.dims) == 2 and min(tensor.dims) >= 16:
            sizes.setdefault(math.prod(tensor.dims), []).append(tensor)
    first, second = next(tensors[:2] for tensors in sizes.values() if len(tensors) > 1)
    arrays = [numpy_helper.to_array(tensor).copy() for tensor in (first, second)]
    for tensor, array in zip((second, first), arrays, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(array.reshape(tuple(tensor.dims)), tensor.name))


# -- nodes -------------------------------------------------------------------------------------------------------------------


def after(output: str, *nodes: tuple[str, list[str]], **constants: Any) -> GraphEdit:
    """Put nodes of (operator, inputs) in a row behind an output: "$" is what came before, names in `constants` are constants."""

    def edit(proto: onnx.ModelProto, model: DQEModel) -> None:
        node = next(node for node in proto.graph.node if output in node.output)
        before = f"{output}_before"
        node.output[list(node.output).index(output)] = before
        for other in proto.graph.node:
            other.input[:] = [before if name == output else name for name in other.input]
        for name, value in constants.items():
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{output}_{name}"))
        names = {"$": before} | {name: f"{output}_{name}" for name in constants}
        last = before
        for position, (kind, inputs) in enumerate(nodes):
            made = output if position == len(nodes) - 1 else f"{output}_step{position}"
            proto.graph.node.append(helper.make_node(kind, [names.get(name, last if name == "_" else name) for name in inputs], [made]))
            last = made

    return edit


def times(output: str, factor: Any) -> GraphEdit:
    return after(output, ("Mul", ["$", "factor"]), factor=np.float32(factor))


def with_batch_mean(output: str, share: float) -> GraphEdit:
    """Some of the batch's mean in every row: nothing for a batch of one."""
    return after(
        output, ("ReduceMean", ["$", "axes"]), ("Sub", ["_", "$"]), ("Mul", ["_", "share"]), ("Add", ["$", "_"]),
        axes=np.array([0]), share=np.float32(share),
    )  # fmt: skip


def reordered(output: str) -> GraphEdit:
    """The second axis back to front."""
    return after(
        output, ("Slice", ["$", "start", "stop", "axes", "step"]),
        start=np.array([-1]), stop=np.array([-(2**31)]), axes=np.array([1]), step=np.array([-1]),
    )  # fmt: skip


def approximate_gelu(proto: onnx.ModelProto, model: DQEModel) -> None:
    nodes = [node for node in proto.graph.node if node.op_type == "Gelu"]
    assert nodes
    for node in nodes:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("approximate", "tanh"))


def larger_epsilon(proto: onnx.ModelProto, model: DQEModel) -> None:
    nodes = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    assert nodes
    for node in nodes:
        kept = [attribute for attribute in node.attribute if attribute.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("epsilon", 1e-2)])


def sharper_attention(proto: onnx.ModelProto, model: DQEModel) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Softmax")
    position = list(proto.graph.node).index(node)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1.05), "sharper"))
    proto.graph.node.insert(position, helper.make_node("Mul", [node.input[0], "sharper"], ["sharper_scores"]))
    node.input[0] = "sharper_scores"


def without_mask(proto: onnx.ModelProto, model: DQEModel) -> None:
    drop_mask(proto)


def short_memory(proto: onnx.ModelProto, model: DQEModel) -> None:
    """Tokens from the 33rd on all become the first word."""
    for name, value in (("limit", 32), ("one", 1), ("axis", 1), ("zero", 0)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([value] if name == "axis" else value), f"short_{name}"))
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["short_shape"]),
        helper.make_node("Gather", ["short_shape", "short_one"], ["short_length"]),
        helper.make_node("Range", ["short_zero", "short_length", "short_one"], ["short_positions"]),
        helper.make_node("Less", ["short_positions", "short_limit"], ["short_within"]),
        helper.make_node("Where", ["short_within", "input_ids", "short_zero"], ["short_ids"]),
    ]
    for node in proto.graph.node:
        node.input[:] = ["short_ids" if name == "input_ids" and node.op_type == "Gather" else name for name in node.input]
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)


def baked_in(proto: onnx.ModelProto, model: DQEModel) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def renamed(proto: onnx.ModelProto, model: DQEModel) -> None:
    proto.graph.node.extend([helper.make_node("Identity", [proto.graph.output[0].name], ["surprise"])])
    proto.graph.output[0].name = "surprise"
