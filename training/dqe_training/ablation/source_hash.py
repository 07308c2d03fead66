"""Identity of the code that trains and evaluates a cell: with other code, a cell is another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import dqe_engine
import dqe_training

_ENGINE = (
    "zones", "contracts", "preprocessing.py", "image_cost.py", "image_metadata.py", "image_policy.py", "image_sources.py",
    "colour_profiles.py", "tiff_directory.py", "device_arrays.py", "driver_library.py", "errors.py", "files.py",
)  # fmt: skip
"""What training and evaluation take from the engine; a file or a folder."""
_TELL = ("cli", *(f"ablation/{name}.py" for name in ("comparison", "plot", "report", "statistics", "table")))
"""What only asks for a cell or tells of it: it may change, and the cell stays."""


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
    for path in sorted(path for pattern in ("*.py", "*.safetensors", "*.json", "*.yaml") for path in training.rglob(pattern)):
        if not any(path.is_relative_to(other) for other in told):
            yield training, path
    for name in _ENGINE:
        at = engine / name
        yield from ((engine, path) for path in (sorted(at.rglob("*.py")) if at.is_dir() else [at]))


def _kernels() -> bytes:
    """The compiled kernels' own bytes: they mine and rank."""
    spec = find_spec("dqe_engine._kernels")
    return b"" if spec is None or spec.origin is None else Path(spec.origin).read_bytes()


_HASH = hashlib.sha256(
    hash_source(_folder(dqe_training.__file__), _folder(dqe_engine.__file__)).encode()
    + hashlib.sha256(_kernels()).digest()
    + " ".join(version(name) for name in ("torch", "transformers", "numpy", "tokenizers")).encode()
).hexdigest()


def source_hash() -> str:
    """SHA-256 over the source files, shipped weights and compiled kernels of this process, as they were when it began, and the versions of
    the libraries that it trains with."""
    return _HASH
