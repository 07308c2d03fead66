"""Files that an ONNX graph takes weights from, read from its bytes without the onnx package.

Any tensor of a graph may lie in another file, by a path: in an initializer, in an attribute of a node, in a subgraph or a function.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from .contracts.graphs import GraphSpec
from .contracts.manifest import FileEntry, graph_files
from .errors import BundleError
from .files import describe_os_error

MOST_FIELDS = 10_000_000
"""Protobuf fields looked at, of one graph: a hundred times what large ones have."""
MOST_NESTED = 100
"""Messages within messages; protobuf's own limit."""

_PARTS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Numbers of the fields of onnx.proto through which tensors are reached, by the kind of message; all others are skipped by their length."""
_COMPILED = b"EPContext"
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


def check_weights(root: Path, graph: GraphSpec, listed: tuple[FileEntry, ...]) -> None:
    """Raises BundleError where a graph's file takes weights from any but its own file of weights, listed in the manifest.

    Nothing else of a folder is verified, and a graph's identity is that of these two files (`BundleManifest.graph_hash`).
    """
    file, (_, weights) = root / graph.file, graph_files(graph)
    allowed = weights if any(entry.path == weights for entry in listed) else None
    for location in external_locations(file):
        if location != allowed:
            expected = f"{weights!r}, which the manifest lists" if allowed else "weights within the graph: the manifest lists no other file"
            raise BundleError(f"{file}: takes weights from {location[:200]!r}, expected {expected}; do not use this bundle")


def external_locations(file: Path) -> set[str]:
    """Every path that a tensor of the ONNX graph `file` names, used or not.

    Whether protobuf takes a path into account depends on what follows (a field given twice is merged), so all of them count. Raises
    BundleError for what is no protobuf message, has more fields or depth than any graph, or holds parts that a provider compiled.
    """
    try:
        with file.open("rb") as stream:
            if not file.stat().st_size:
                return set()
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return {where.decode("utf-8", "backslashreplace") for where in _locations(data)}
    except OSError as error:
        raise BundleError(describe_os_error(error, file)) from error
    except ValueError as error:
        raise BundleError(f"{file}: not an ONNX graph ({error}); copy the bundle again") from error


def _locations(data: mmap.mmap) -> Iterator[bytes]:
    waiting, looked_at = [("model", 0, len(data), 0)], 0
    while waiting:
        kind, at, end, depth = waiting.pop()
        parts, keys, values = _PARTS.get(kind, {}), list[bytes](), list[bytes]()
        while at < end:
            looked_at += 1
            if looked_at > MOST_FIELDS:
                raise ValueError(f"more than {MOST_FIELDS} fields")
            tag, at = _varint(data, at, end)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                raise ValueError(f"a field of number {number}")
            if wire == _BYTES:
                size, at = _varint(data, at, end)
                start, at = at, at + size
            elif wire == _VARINT:
                _, at = _varint(data, at, end)
            elif wire in _FIXED:
                at += _FIXED[wire]
            else:
                raise ValueError(f"a field of wire type {wire}")
            if at > end:
                raise ValueError("a field that is longer than what holds it")
            if wire != _BYTES:
                continue
            if kind == "entry":
                (keys if number == 1 else values).append(data[start:at])
            elif kind == "node" and number == 4 and data[start:at] == _COMPILED:
                raise ValueError("it has compiled parts (EPContext), which may lie in any file")
            elif inner := parts.get(number):
                if depth == MOST_NESTED:
                    raise ValueError(f"more than {MOST_NESTED} messages within one another")
                waiting.append((inner, start, at, depth + 1))
        if b"location" in keys:
            yield from values or [b""]


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number without an end")
