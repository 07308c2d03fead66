"""Strict parsing of JSON, YAML or plain dicts into frozen structs: unknown keys and wrong types are refused by name."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from dqe_engine.errors import DQEError, InputError


class Contract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every contract: immutable, keyword-only, strict. Subclasses validate in `__post_init__` (`ValueError`)."""


T = TypeVar("T", bound=msgspec.Struct)


def parse(kind: type[T], data: Any, *, where: str, error: type[DQEError] = InputError) -> T:
    """Convert plain data to `kind`, or raise `error` with one line that names `where`, the path and the valid keys."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as problem:
        message = str(problem)
        if "unknown field" in message:
            message += f"; valid keys of {kind.__name__}: {', '.join(kind.__struct_fields__)}" if "at `$." not in message else ""
        raise error(f"{where}: {message}") from problem


def parse_json(kind: type[T], raw: bytes, *, where: str, error: type[DQEError] = InputError) -> T:
    """Like `parse`, from JSON bytes; broken JSON is the same `error`."""
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise error(f"{where}: not valid JSON: {problem}") from problem
    return parse(kind, data, where=where, error=error)


def to_json(value: Any) -> bytes:
    """Indented, key-stable JSON, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
