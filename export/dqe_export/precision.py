"""Lower precisions of an exported graph: float16, int8 with a scale per row, int8 with fixed scales; inputs and outputs stay float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import onnx
from numpy.typing import NDArray

from dqe_engine.errors import ExportError

from .attention_blocks import attention_blocks
from .onnx_graph import save_graph, weights_beside
from .row_int8 import may_saturate, quantise_rows

T = TypeVar("T")
Int8 = Literal["int8", "int8-static"]
Lower = Literal["float16", Int8]
_FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceL2", "ReduceMean", "ReduceSum", "Clip", "Div")
"""Sums of squares and exponentials, which leave float16's range, and the divisions by them. The softmax of attention in the GPU form is
float16, since casts inside would hide the pattern: it takes what it would take between casts, and kernels sum in float32 themselves."""
_AT_ONCE = 8
"""Queries in a batch while scales are read off them."""
_QUANTISED_OPS = ("MatMul", "Gather")  # Gather: the word embeddings. Not Gemm: see `quantise_rows`


def convert(
    source: Path, path: Path, precision: Lower, *, keep: Collection[str] = (), inputs: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write `path` from the float32 graph `source`, in another folder.

    `keep`: names of nodes that int8 leaves in float32. `inputs`: of "int8-static", whose scales of activations are read off them.
    """
    if precision == "float16":
        proto = _float16(source)
    elif precision == "int8-static":
        assert inputs is not None
        proto = _static_int8(source, keep, inputs)
    else:
        proto = onnx.load(source)
        quantise_rows(proto, keep=keep)
        if overflowing := may_saturate(proto):
            raise ExportError(
                f"{len(overflowing)} 8-bit products of {path.name} would overflow on processors without VNNI: {overflowing[0]}"
            )
    save_graph(proto, path)


def _float16(source: Path) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    large = weights_beside(source).exists()  # protobuf cannot pass such a graph to shape inference
    proto = onnx.load(source)
    fused = {block.softmax for block in attention_blocks(proto.graph)}
    blocked = [node.name for node in proto.graph.node if node.op_type in _FLOAT32_OPS and node.name not in fused]
    proto = _quietly(
        lambda: convert_float_to_float16(
            proto, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=blocked, disable_shape_infer=large
        )
    )
    OnnxModel(proto).topological_sort()  # casts of inputs come last otherwise
    return proto


def _static_int8(source: Path, keep: Collection[str], inputs: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """Weights symmetric and per channel. Activations symmetric and per tensor, by scales that are read off `inputs`, in QuantizeLinear and
    DequantizeLinear pairs, which is how TensorRT takes 8 bits."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    target = source.with_name(f"int8-{source.name}")
    options = {
        "MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT, "ActivationSymmetric": True, "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": ["MatMul"],
    }  # fmt: skip
    count = len(next(iter(inputs.values())))
    parts = iter([{name: a[at : at + _AT_ONCE] for name, a in inputs.items()} for at in range(0, count, _AT_ONCE)])
    reader = SimpleNamespace(get_next=lambda: next(parts, None))
    _quietly(
        lambda: quantize_static(
            source, target, reader, quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_QUANTISED_OPS), per_channel=True, nodes_to_exclude=list(keep),
            use_external_data_format=weights_beside(source).exists(), extra_options=options,
        )
    )  # fmt: skip
    proto = onnx.load(target)
    for file in (target, weights_beside(target)):
        file.unlink(missing_ok=True)
    return proto


def _quietly(work: Callable[[], T]) -> T:
    """Without the advice that these tools log."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        return work()
    finally:
        root.setLevel(before)
