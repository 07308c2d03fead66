"""JSON documents that say what they are: `kind`, so that nothing takes another's folder for its own, and `schema_version`.

Documents from before `kind` are known by keys that only theirs have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from dqe_engine.errors import DQEError
from dqe_engine.files import describe_os_error, require_regular

from .parsing import NOT_JSON, Contract, parse

MOST_BYTES = 64 << 20
"""Of a document: more than any of ours takes, less than what would exhaust memory."""
_NAMES: Mapping[str, str] = {
    "gallery-index": "an index",
    "sharded-index": "a sharded index",
    "index-elsewhere": "a file that says where an index is",
    "bundle": "a bundle",
    "attribute-heads": "attribute heads",
    "tensorrt-engines": "a folder of TensorRT engines",
    "mined-negatives": "mined negatives",
    "mining-run": "an unfinished mining run",
    "training-checkpoint": "a training checkpoint",
    "image-features": "a feature cache",
    "ablation-cell": "a cell of an ablation",
    "ablation-results": "the results of an ablation",
    "benchmark-results": "the results of a benchmark",
    "reproduction": "the results of a reproduction",
}
"""What people call each kind. All kinds that there are."""
_WITHOUT_KIND: Sequence[tuple[tuple[str, ...], str]] = (
    (("catalogue",), "gallery-index"),
    (("graphs",), "bundle"),
    (("encoder_hash",), "attribute-heads"),
    (("engines",), "tensorrt-engines"),
    (("plan", "files"), "mined-negatives"),
    (("plan",), "mining-run"),
    (("progress", "files"), "training-checkpoint"),
    (("image_tokens",), "image-features"),
    (("refreshes", "scores"), "ablation-cell"),
    (("against", "arms"), "ablation-results"),
    (("benchmark", "sections"), "benchmark-results"),
)
"""Keys, and the kind of a document that has them all; the first that fits."""
_BY_FILE: Mapping[str, str] = {
    "checkpoint.json": "a training checkpoint; export it first",
    "heads.json": "attribute heads; dqe-heads puts them into a bundle",
    "engines.json": "a folder of TensorRT engines; the bundle is two folders up",
}
"""What a folder without the document that was looked for is, by a file in it."""


class Versioned(Contract, frozen=True):
    """Base of what is read by `read_document`. Subclasses give defaults to both fields."""

    OLDEST_SCHEMA: ClassVar[int] = 1

    kind: str
    schema_version: int

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`data` with what older versions wrote elsewhere or called otherwise where `cls` has it. It may hold anything."""
        return data


V = TypeVar("V", bound=Versioned)


def read_document(document: type[V], where: Path, *, remedy: str, error: type[DQEError], other_schema: type[DQEError] | None = None) -> V:
    """Parse the file `where` strictly. `remedy`: how to come by a good one, such as "export again".

    Raises `error`, one line, for what cannot be read, is no JSON, another kind's, of a newer or no longer supported schema (then as
    `other_schema`, if that is given), or not as the schema says. FileNotFoundError and NotADirectoryError pass through: what a missing
    document means is the caller's to say.
    """
    try:
        status = require_regular(where)
        if status.st_size > MOST_BYTES:
            raise error(f"{where}: {status.st_size} bytes, expected at most {MOST_BYTES}; {remedy}")
        data = msgspec.json.decode(where.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as problem:
        raise error(describe_os_error(problem, where)) from problem
    except NOT_JSON as problem:
        raise error(f"{where}: not valid JSON ({problem}); {remedy}") from problem
    except ValueError as problem:
        raise error(f"{str(where)!r}: not a path ({problem}); check it") from problem
    wanted, newest = _defaults(document)
    if (found := _kind_of(data)) != wanted:
        is_what = _NAMES.get(found or "", f"of kind {found!r}" if found else "something else")
        raise error(f"{where}: this is {is_what}, not {_NAMES[wanted]}; check the path")
    data = document.upgraded(data)
    # Looked at before strict parsing: a newer schema may have keys that this version would call unknown.
    version = data.get("schema_version")
    if isinstance(version, int) and version > newest:
        raise (other_schema or error)(f"{where}: schema version {version} is newer than the supported {newest}; upgrade dqe-engine")
    if not isinstance(version, int) or isinstance(version, bool) or version < document.OLDEST_SCHEMA:
        raise (other_schema or error)(f"{where}: schema_version must be {document.OLDEST_SCHEMA} to {newest}, got {version!r}; {remedy}")
    return parse(document, data, where=str(where), error=error)


def describe_folder(folder: Path) -> str | None:
    """What a folder is that lacks the document that was looked for, and what to do with it; None for nothing that we know."""
    try:
        return next((what for name, what in _BY_FILE.items() if (folder / name).is_file()), None)
    except (OSError, ValueError):
        return None


def _defaults(document: type[Versioned]) -> tuple[str, int]:
    defaults = {field.name: field.default for field in msgspec.structs.fields(document)}
    return defaults["kind"], defaults["schema_version"]


def _kind_of(data: Any) -> str | None:
    """What a decoded document says it is, or is known to be."""
    if not isinstance(data, dict):
        return None
    if isinstance(kind := data.get("kind"), str):
        return kind
    return next((kind for keys, kind in _WITHOUT_KIND if all(key in data for key in keys)), None)
