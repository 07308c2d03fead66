"""What a stage's output is made of, as a short hash in the name of its folder: other inputs go to another folder, equal ones are found."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dqe_engine
import dqe_export
from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, sha256_of
from dqe_training.ablation.source_hash import source_hash

_LIBRARIES = ("onnx", "onnxruntime")
"""Beside those that `source_hash` names."""
_TELL = ("cli", "server", "doctor", "demo", "reproduce")
"""Folders of code that makes no number of a stage."""


def key_of(*parts: Any) -> str:
    """12 hexadecimal digits of anything that JSON holds."""
    return hashlib.sha256(to_json(parts)).hexdigest()[:12]


@cache
def software() -> str:
    """Identity of the code and the libraries that import, export and encode."""
    digest = hashlib.sha256(source_hash().encode())
    for package in (dqe_engine, dqe_export):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            if path.relative_to(root).parts[0] not in _TELL:
                digest.update(path.relative_to(root).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(" ".join(version(name) for name in _LIBRARIES).encode())
    return digest.hexdigest()


def content_key(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder with their names. Raises InputError."""
    try:
        if path.is_dir():
            return key_of([(p.relative_to(path).as_posix(), sha256_of(p)) for p in sorted(path.rglob("*")) if p.is_file()])
        return sha256_of(path)
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
