"""The smallest ONNX graph that exercises a provider: y = x · x, matrices of float32.

Written as protobuf by hand, because the runtime does not have the `onnx` package. The numbers are the field numbers of
onnx.proto3 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3); a test holds the bytes against the package.
"""

from __future__ import annotations

SIDE = 8
"""x and y are (SIDE, SIDE)."""
IR_VERSION, OPSET = 8, 13  # old enough for every ONNX Runtime that this project supports
_FLOAT = 1  # TensorProto.FLOAT


def tiny_graph() -> bytes:
    """The serialised ModelProto: input "x", output "y", both (SIDE, SIDE) float32; y is the matrix product of x with itself."""
    node = _text(1, "x") + _text(1, "x") + _text(2, "y") + _text(4, "MatMul")
    graph = _message(1, node) + _text(2, "tiny") + _message(11, _value("x")) + _message(12, _value("y"))
    return _number(1, IR_VERSION) + _message(7, graph) + _message(8, _number(2, OPSET))


def _value(name: str) -> bytes:
    """ValueInfoProto: name, type.tensor_type (elem_type, shape.dim[].dim_value)."""
    dimension = _message(1, _number(1, SIDE))
    tensor = _number(1, _FLOAT) + _message(2, dimension + dimension)
    return _text(1, name) + _message(2, _message(1, tensor))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
