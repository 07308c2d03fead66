"""Lower precisions of an exported graph: float16 and int8 by ONNX Runtime's own tools; inputs and outputs stay float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, TypeVar

import onnx

from .onnx_graph import save_graph, weights_beside

T = TypeVar("T")
Lower = Literal["float16", "int8"]
_FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceL2", "ReduceMean", "ReduceSum", "Clip", "Div")
"""Sums of squares and exponentials, which leave float16's range, and the divisions by them."""
_QUANTISED_OPS = ("MatMul", "Gemm", "Gather")  # Gather: the word embeddings


def convert(source: Path, path: Path, precision: Lower, *, keep: Collection[str] = ()) -> None:
    """Write `path` from the float32 graph `source`, in another folder. `keep`: names of nodes that int8 leaves in float32."""
    save_graph(_float16(source) if precision == "float16" else _int8(source, keep), path)


def _float16(source: Path) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    blocked = [*DEFAULT_OP_BLOCK_LIST, *_FLOAT32_OPS]
    large = weights_beside(source).exists()  # protobuf cannot pass such a graph to shape inference
    proto = onnx.load(source)
    proto = _quietly(lambda: convert_float_to_float16(proto, keep_io_types=True, op_block_list=blocked, disable_shape_infer=large))
    OnnxModel(proto).topological_sort()  # casts of inputs come last otherwise
    return proto


def _int8(source: Path, keep: Collection[str]) -> onnx.ModelProto:
    """Weights symmetric and per channel, once; activations per tensor, at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = source.with_name(f"int8-{source.name}")
    _quietly(
        lambda: quantize_dynamic(
            source, target, op_types_to_quantize=list(_QUANTISED_OPS), per_channel=True, weight_type=QuantType.QInt8,
            nodes_to_exclude=list(keep), use_external_data_format=weights_beside(source).exists(),
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
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
