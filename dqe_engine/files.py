"""Files that are either whole or absent: temporary name in the same folder, fsync, atomic rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_TEMPORARY_PREFIX = ".tmp-"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends, and vanishes when the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path` that becomes `path` when the block ends.

    With `replace`, an existing directory is moved aside just before the rename and removed after it. Raises
    `FileExistsError` at once when `path` exists and `replace` is false. Remains of killed runs are removed.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(path)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            fsync_path(file)
        temporary.chmod(0o755)
        if path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{path.name}.", dir=path.parent))
            os.replace(path, aside / "old")
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)


def remove_stale_temporaries(path: Path) -> None:
    """Remove what killed writers of the directory `path` left beside it; restore a replaced copy that never landed."""
    for stale in path.parent.glob(f"{_TEMPORARY_PREFIX}{path.name}.*"):
        if not path.exists() and (stale / "old").is_dir():
            os.replace(stale / "old", path)
        shutil.rmtree(stale, ignore_errors=True)
