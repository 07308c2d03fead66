"""Seeded mutations of a document: values that programs trip over, and damaged bytes."""

from __future__ import annotations

import json
import random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**32, 2**62, 2**63, -(2**63), 2**64, 10**40, 0.0, -0.0, 1e308, -1e308, 1e-320, 1.5, 1e999,
    "", "\0", "\n", "a\nb", "\ud800", "../x", "/etc/passwd", ".", "..", "x" * 5000, "٣", "🙂", "nan", "{}", "%s", "e" * 64,
    [], {}, [[]], [{}], [None], {"": ""}, {"kind": "bundle"}, {"schema_version": 10**20}, {"<": float("nan")}, {"in": [[1]]},
    ["a"] * 1000, {str(n): n for n in range(300)},
)  # fmt: skip
_INSERTED = (b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"[" * 2000, b'{"a":' * 2000, b"1" * 5000, b"1e400", b'"\\ud800"')
_REPLACED = ((b"1", b"-1"), (b'"', b""), (b":", b","), (b"{", b"["), (b"0", b"9999999999999999999"))


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """`seed` changed in one to four places: as JSON, where it is such, or as bytes."""
    data = seed
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        changed = _changed_json(data, rng) if rng.random() < 0.7 else None
        data = _changed_bytes(data, rng) if changed is None else changed
    return data


def _changed_json(data: bytes, rng: random.Random) -> bytes | None:
    lines = data.split(b"\n") if data.count(b"\n{") else [data]  # JSON lines, or one document
    at = rng.randrange(len(lines))
    try:
        document = json.loads(lines[at])
    except (ValueError, RecursionError):
        return None
    if len(lines) > 1 and rng.random() < 0.2:
        lines.insert(at, rng.choice(lines))
        return b"\n".join(lines)
    places: list[tuple[Any, Any]] = []
    stack = [document]
    while stack and len(places) < 10_000:
        node = stack.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            stack.append(node[key])
    if not places or rng.random() < 0.03:
        document = rng.choice(HOSTILE)
    else:
        node, key = rng.choice(places)
        action = rng.random()
        if action < 0.5:
            node[key] = rng.choice(HOSTILE)
        elif action < 0.65:
            del node[key]
        elif action < 0.8:
            other, name = rng.choice(places)
            node[key] = json.loads(json.dumps(other[name])) if name in (other if isinstance(other, dict) else range(len(other))) else 1
        elif action < 0.9 and isinstance(node, dict):
            node[str(rng.choice(HOSTILE))] = rng.choice(HOSTILE)
        elif action < 0.95:
            node[key] = _deep(rng.choice((3, 40, 1500)), rng)
        elif isinstance(node[key], int | float):
            node[key] = node[key] * rng.choice((-1, 2, 0.5, 10**9))
    try:
        lines[at] = json.dumps(document).encode("utf-8", "surrogatepass")
    except (RecursionError, OverflowError):
        return None
    return b"\n".join(lines)


def _deep(levels: int, rng: random.Random) -> Any:
    value: Any = 1
    word = rng.choice(("and", "or", "not", "x"))
    for _ in range(levels):
        value = [value] if rng.random() < 0.5 else {word: [value]}
    return value


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
    at, action = rng.randrange(len(data) + 1), rng.randrange(8)
    if action == 0:
        return data[:at]
    if action == 1 and data:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if action == 2 and data:
        return data[:at] + bytes([data[min(at, len(data) - 1)] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if action == 3:
        return data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at:]
    if action == 4:
        stop = rng.randrange(at, len(data) + 1)
        return data[:at] + data[stop:]
    if action == 5:
        stop = min(len(data), at + rng.randrange(1, 200))
        return data[:at] + data[at:stop] * rng.choice((2, 3, 50)) + data[stop:]
    if action == 6:
        return data[:at] + rng.choice(_INSERTED) + data[at:]
    return data.replace(*rng.choice(_REPLACED), 1)
