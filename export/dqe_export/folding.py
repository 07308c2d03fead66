"""What a graph computes from its weights alone, computed once: the Q-Former's first layer over its queries, weights in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_SMALL = 4096  # bytes, of what may be larger than what it is made of: shapes and masks

Arrays = dict[str, NDArray[Any]]


def fold_constants(proto: onnx.ModelProto) -> None:
    """Replace nodes that read no input by weights, in place, unless weights took more room for it: nothing is expanded or copied."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    values, constant = _constant_nodes(proto, weights)
    while constant:
        read = {name for node in graph.node if node.output[0] not in constant for name in node.input}
        folded = [name for name in constant if name in read]
        before = sum(_bytes(tensor) for tensor in weights.values())
        after = sum(_bytes(weights[name]) for name in weights if name in read) + sum(values[name].nbytes for name in folded)
        if after <= before + _SMALL:
            break
        constant.remove(max(folded, key=lambda name: values[name].nbytes))
    else:
        return
    _keep(graph.initializer, [tensor.name in read for tensor in graph.initializer])
    graph.initializer.extend(numpy_helper.from_array(values[name], name) for name in folded)
    _keep(graph.node, [node.output[0] not in constant for node in graph.node])
    made = {name for node in graph.node for name in node.output}
    _keep(graph.value_info, [info.name in made for info in graph.value_info])


def _constant_nodes(proto: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> tuple[Arrays, list[str]]:
    """The outputs of the nodes that depend on `weights` alone, with their values, in the graph's order."""
    values: Arrays = {}
    found = []
    outputs = {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        if len(node.output) != 1 or node.output[0] in outputs or any(attribute.HasField("g") for attribute in node.attribute):
            continue
        if not all(name in weights or name in values for name in node.input if name):
            continue
        read = {name: values[name] if name in values else numpy_helper.to_array(weights[name]) for name in node.input if name}
        value = _run(proto, node, read)
        if value.nbytes <= max(_SMALL, sum(array.nbytes for array in read.values())):
            values[node.output[0]] = value
            found.append(node.output[0])
    return values, found


def _run(proto: onnx.ModelProto, node: onnx.NodeProto, inputs: Arrays) -> NDArray[Any]:
    """By ONNX Runtime, which is what computes it otherwise."""
    import onnxruntime

    declared = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()]
    output = onnx.ValueInfoProto(name=node.output[0])
    graph = helper.make_graph([node], "constant", declared, [output])
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # no pool of threads for each node
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (value,) = session.run(None, inputs)
    return value


def _bytes(tensor: onnx.TensorProto) -> int:
    return len(tensor.raw_data) or numpy_helper.to_array(tensor).nbytes


def _keep(field: Any, kept: Sequence[bool]) -> None:
    """In place, since weights may be gigabytes."""
    for i in reversed(range(len(kept))):
        if not kept[i]:
            del field[i]
