"""The two record types of a CIR dataset on disk, as JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from dqe_engine.contracts.parsing import Contract, parse_json, without_mark
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_write, describe_os_error, require_regular


class TripletRecord(Contract, frozen=True, omit_defaults=True):
    """One training or evaluation triplet. Images are paths relative to the image folder.

    `attributes`: the attributes that the text asks to change, with the target's value (the presence labels of the
    attribute weights). `allowed`: every value that would satisfy the text, where a dataset knows. `held_out`: the
    target's attribute combination does not occur in training. `wordings`: other texts that say the same; training reads
    the text or one of these, drawn anew for each epoch.
    """

    reference: str
    target: str
    text: str
    attributes: dict[str, str] | None = None
    allowed: dict[str, list[str]] | None = None
    held_out: bool = False
    wordings: tuple[str, ...] = ()


class ImageRecord(Contract, frozen=True):
    """Attribute labels of one image."""

    image: str
    attributes: dict[str, str]


def named_values(record: TripletRecord) -> dict[str, set[str]] | None:
    """The values that a text leaves valid, of the attributes that it names: `allowed`, else the target's value alone (`attributes`). None
    where the triplet has neither."""
    if record.allowed is not None:
        return {name: set(values) for name, values in record.allowed.items()}
    return None if record.attributes is None else {name: {value} for name, value in record.attributes.items()}


def allowed_values(record: TripletRecord, reference: Mapping[str, str]) -> dict[str, set[str]]:
    """The values that answer a triplet: those of `named_values`, and the reference image's own of every attribute that the text leaves
    alone."""
    return {name: {value} for name, value in reference.items()} | (named_values(record) or {})


R = TypeVar("R", TripletRecord, ImageRecord)


def write_jsonl(path: Path, records: Iterable[msgspec.Struct]) -> None:
    """One record a line, atomically."""
    encoder = msgspec.json.Encoder()
    with atomic_write(path) as stream:
        for record in records:
            stream.write(encoder.encode(record) + b"\n")


def read_jsonl(path: Path, kind: type[R]) -> list[R]:
    """Read records; blank lines are skipped. Raises InputError naming the file and line for anything else."""
    try:
        require_regular(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected JSON lines of {kind.__name__}") from error
    except OSError as error:
        raise InputError(f"{describe_os_error(error, path)}; expected JSON lines of {kind.__name__}") from error
    records: list[R] = []
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if without_mark(line).strip():
                records.append(parse_json(kind, line, where=f"{path}, line {number}"))
    if not records:
        raise InputError(f"{path}: holds no records; expected one JSON object a line")
    return records


def check_texts(records: Sequence[TripletRecord], *, where: str) -> None:
    """Raise InputError for the first triplet whose text, or one of its wordings, is empty or blank."""
    for number, record in enumerate(records, start=1):
        if not all(text.strip() for text in (record.text, *record.wordings)):
            raise InputError(f"{where}, record {number}: empty text; remove the triplet or write what changes")
