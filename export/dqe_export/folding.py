"""What a graph computes from its weights alone, computed once: the Q-Former's first layer over its queries, weights in another order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

_SMALL = 4096  # bytes, of what may be larger than what it is made of: shapes and masks

Arrays = dict[str, NDArray[Any]]


def fold_constants(proto: onnx.ModelProto) -> None:
    """Put results in the place of nodes that read weights alone. `proto` is changed, and its weights take no more room than before.

    Computed in float64 and rounded at the end, so that the processor that exports leaves no trace in the last bits: a bundle's identity is
    that of its files.
    """
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type != TensorProto.DOUBLE}
    values, constant = _constant_nodes(proto, weights)
    while constant:
        read = {name for node in graph.node if node.output[0] not in constant for name in node.input}
        folded = [name for name in constant if name in read]
        before = sum(_bytes(tensor) for tensor in weights.values())
        after = sum(_bytes(weights[name]) for name in weights if name in read) + sum(_stored(values[name]).nbytes for name in folded)
        if after <= before + _SMALL:
            break
        constant.remove(max(folded, key=lambda name: _stored(values[name]).nbytes))
    else:
        return
    _keep(graph.initializer, [tensor.name in read for tensor in graph.initializer])
    graph.initializer.extend(numpy_helper.from_array(_stored(values[name]), name) for name in folded)
    _keep(graph.node, [node.output[0] not in constant for node in graph.node])
    made = {name for node in graph.node for name in node.output}
    _keep(graph.value_info, [info.name in made for info in graph.value_info])


def layers_left(path: Path, module: nn.Module) -> set[str]:
    """Names of the linear layers of `module` whose weights a MatMul of the graph `path` takes, as they are or transposed. Others are
    folded, or no product of tokens (`row_int8`)."""
    graph = onnx.load(path).graph
    taken = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    tensors = (tensor for tensor in graph.initializer if tensor.name in taken)
    held = {_digest(numpy_helper.to_array(tensor)) for tensor in tensors}
    weights = {name: layer.weight.detach().numpy() for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return {name for name, weight in weights.items() if held.intersection(map(_digest, (weight, weight.T)))}


def _digest(array: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _constant_nodes(proto: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> tuple[Arrays, list[str]]:
    """The outputs of the nodes that depend on `weights` alone, in the graph's order, and their values; float64 stands for float32.

    Without those that are larger than all that they are computed from, such as an expanded row, and what only a processor's own float32
    kernels can compute.
    """
    values: Arrays = {}
    found = []
    outputs = {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        names = [name for name in node.input if name]
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.DOUBLE:
            continue
        if not names or not all(name in weights or name in values for name in names) or outputs.intersection(node.output):
            continue
        read = {name: values[name] if name in values else _widened(numpy_helper.to_array(weights[name])) for name in names}
        value = _run(proto, node, read)
        if value is not None and value.nbytes <= max(_SMALL, sum(array.nbytes for array in read.values())):
            values[node.output[0]] = value
            found.append(node.output[0])
    return values, found


def _run(proto: onnx.ModelProto, node: onnx.NodeProto, inputs: Arrays) -> NDArray[Any] | None:
    """The output of a node, by ONNX Runtime; None where it has several, or no kernel for float64."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    if len(node.output) != 1:
        return None
    declared = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()]
    graph = helper.make_graph([node], "constant", declared, [onnx.ValueInfoProto(name=node.output[0])])
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # no pool of threads for each node
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except NoKernel:
        return None
    (value,) = session.run(None, inputs)
    return _widened(value)


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _stored(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _bytes(tensor: onnx.TensorProto) -> int:
    """By its type and shape: reading the values would copy them."""
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _keep(field: Any, kept: Sequence[bool]) -> None:
    """In place, since weights may be gigabytes."""
    for i in reversed(range(len(kept))):
        if not kept[i]:
            del field[i]
