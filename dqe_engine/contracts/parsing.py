"""Strict parsing of JSON, YAML or plain dicts into frozen structs: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import codecs
import re
from typing import Any, TypeVar, get_args

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
            struct = _struct_at(kind, message)
            message += f"; valid keys of {struct.__name__}: {', '.join(struct.__struct_fields__)}"
        raise error(f"{where}: {message}") from problem


def _struct_at(kind: type[msgspec.Struct], message: str) -> Any:
    """The struct type that a message's path (like "at `$.model.vision`") points at."""
    path = re.search(r"at `\$(.*)`", message)
    current: Any = kind
    for key in re.findall(r"\.(\w+)", path.group(1)) if path else ():
        current = {field.name: field.type for field in msgspec.structs.fields(current)}[key]
        current = next((t for t in (current, *get_args(current)) if isinstance(t, type) and issubclass(t, msgspec.Struct)), current)
    return current


def without_mark(raw: bytes) -> bytes:
    """`raw` without the UTF-8 byte order mark that some editors begin a file with. For what people write by hand."""
    return raw.removeprefix(codecs.BOM_UTF8)


def parse_json(kind: type[T], raw: bytes, *, where: str, error: type[DQEError] = InputError) -> T:
    """Like `parse`, from JSON bytes, with or without a byte order mark; broken JSON is the same `error`."""
    try:
        data = msgspec.json.decode(without_mark(raw))
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise error(f"{where}: not valid JSON: {problem}") from problem
    return parse(kind, data, where=where, error=error)


def to_json(value: Any) -> bytes:
    """Indented, key-stable JSON, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
