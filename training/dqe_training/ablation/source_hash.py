"""Identity of the code that trains and evaluates a cell: with other code, a cell is another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import dqe_engine
import dqe_training

_ENGINE = ("zones", "contracts", "preprocessing.py", "image_sources.py", "image_metadata.py")
"""What training and evaluation take from the engine; a file or a folder."""
_TELL = ("cli", *(f"ablation/{name}.py" for name in ("comparison", "plot", "report", "statistics", "table")))
"""What only asks for a cell or tells of it: it may change, and the cell stays."""


@cache
def source_hash() -> str:
    """SHA-256 over the paths and bytes of this process's source files. Compiled kernels are held to the same results by tests."""
    return hash_source(_folder(dqe_training.__file__), _folder(dqe_engine.__file__))


def _folder(module: str | None) -> Path:
    assert module is not None
    return Path(module).parent


def hash_source(training: Path, engine: Path) -> str:
    """`source_hash` of the two packages in these folders."""
    digest = hashlib.sha256()
    for root, path in _files(training, engine):
        content = path.read_bytes()
        digest.update(f"{root.name}/{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _files(training: Path, engine: Path) -> Iterator[tuple[Path, Path]]:
    told = [training / name for name in _TELL]
    for path in sorted(training.rglob("*.py")):
        if not any(path.is_relative_to(other) for other in told):
            yield training, path
    for name in _ENGINE:
        at = engine / name
        yield from ((engine, path) for path in (sorted(at.rglob("*.py")) if at.is_dir() else [at]))
