"""The smallest ONNX graphs that exercise a provider: y = x · x of float32, and y = a · b of 8-bit integers.

Written as protobuf by hand, because the runtime does not have the `onnx` package. The numbers are the field numbers of
onnx.proto3 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3); a test holds the bytes against the package.
"""

from __future__ import annotations

SIDE = 8
"""All matrices are (SIDE, SIDE)."""
IR_VERSION, OPSET = 8, 13  # old enough for every ONNX Runtime that this project supports
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # TensorProto.DataType


def tiny_graph() -> bytes:
    """The serialised ModelProto: input "x", output "y", float32; y is the matrix product of x with itself."""
    return _model(_product("MatMul", "x", "x"), [("x", _FLOAT)], _FLOAT)


def integer_graph() -> bytes:
    """The serialised ModelProto: inputs "a" uint8 and "b" int8, output "y" int32, their matrix product."""
    return _model(_product("MatMulInteger", "a", "b"), [("a", _UINT8), ("b", _INT8)], _INT32)


def _product(operator: str, left: str, right: str) -> bytes:
    return _text(1, left) + _text(1, right) + _text(2, "y") + _text(4, operator)


def _model(node: bytes, inputs: list[tuple[str, int]], output: int) -> bytes:
    values = b"".join(_message(11, _value(name, kind)) for name, kind in inputs)
    graph = _message(1, node) + _text(2, "tiny") + values + _message(12, _value("y", output))
    return _number(1, IR_VERSION) + _message(7, graph) + _message(8, _number(2, OPSET))


def _value(name: str, kind: int) -> bytes:
    """ValueInfoProto: name, type.tensor_type (elem_type, shape.dim[].dim_value)."""
    dimension = _message(1, _number(1, SIDE))
    tensor = _number(1, kind) + _message(2, dimension + dimension)
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
