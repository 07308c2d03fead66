"""Strict parsing of JSON, YAML or plain dicts into frozen structs: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import msgspec

from dqe_engine.errors import DQEError, InputError


class Contract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every contract: immutable, keyword-only, strict. Subclasses validate in `__post_init__` (`ValueError`).

    `retired`: what to do instead, by a value that a field took in earlier versions and refuses now.
    """

    retired: ClassVar[Mapping[str, str]] = {}


T = TypeVar("T", bound=msgspec.Struct)

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What `msgspec.json.decode` raises for bytes that are no JSON, or are nested too deeply."""


def parse(kind: type[T], data: Any, *, where: str, error: type[DQEError] = InputError) -> T:
    """Convert plain data to `kind`, or raise `error` with one line that names `where`, the path and the valid keys or values."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as problem:
        message = str(problem)
        path = re.search(r"at `\$(.*)`", message)
        keys = re.findall(r"\.(\w+)", path.group(1)) if path else []
        if "unknown field" in message:
            struct = _struct_at(kind, keys)
            message += f"; valid keys of {struct.__name__}: {', '.join(struct.__struct_fields__)}"
        elif value := re.match(r"Invalid enum value '(.*)'", message):
            struct = _struct_at(kind, keys[:-1])
            message += f"; valid values: {', '.join(map(str, _literals(_fields_of(struct)[keys[-1]])))}"
            if value[1] in struct.retired:
                message += f"; {struct.retired[value[1]]}"
        raise error(f"{where}: {message}") from problem


def _struct_at(kind: type[msgspec.Struct], keys: Sequence[str]) -> Any:
    """The struct type that the keys of a message's path (like "at `$.model.vision`") lead to."""
    current: Any = kind
    for key in keys:
        current = _fields_of(current)[key]
        current = next((t for t in (current, *get_args(current)) if isinstance(t, type) and issubclass(t, msgspec.Struct)), current)
    return current


def _fields_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The type of each field, by its name."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def _literals(kind: Any) -> tuple[Any, ...]:
    """The values that a Literal, or a union or a collection of them, allows."""
    inside = get_args(kind)
    return inside if get_origin(kind) is Literal else tuple(value for part in inside for value in _literals(part))


def without_mark(raw: bytes) -> bytes:
    """`raw` without the UTF-8 byte order mark that some editors begin a file with. For what people write by hand."""
    return raw.removeprefix(codecs.BOM_UTF8)


def parse_json(kind: type[T], raw: bytes, *, where: str, error: type[DQEError] = InputError) -> T:
    """Like `parse`, from JSON bytes, with or without a byte order mark; broken JSON is the same `error`."""
    try:
        data = msgspec.json.decode(without_mark(raw))
    except NOT_JSON as problem:
        raise error(f"{where}: not valid JSON: {problem}") from problem
    return parse(kind, data, where=where, error=error)


def to_json(value: Any) -> bytes:
    """Indented, key-stable JSON, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
