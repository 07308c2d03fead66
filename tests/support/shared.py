"""What is expensive to make and only read: made once for a run of pytest (`shared`), or kept for the runs after it (`kept`)."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dqe_engine.files import directory_lock

REPOSITORY = Path(__file__).resolve().parents[2]
_KEPT = REPOSITORY / ".cache" / "tests"
_DAYS = 14
"""Results of `kept` that no run has asked for in this time are removed."""


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make(path)` writes at `path`, which is the same in every worker. The others wait while one makes it.

    Where making it fails, what is half made is not taken for whole: whoever asks next tries again, and fails by itself.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own within the run's
        root = root.parent
    return _made_once(root / "shared" / name, name, make)


def kept(factory: pytest.TempPathFactory, name: str, key: str, make: Callable[[Path], object]) -> Path:
    """As `shared`, but later runs find it too: `key` must change with everything that the result depends on. `make clean` removes all.

    `DQE_TESTS_KEEP=0` makes everything again in each run, and so does a checkout that cannot be written to.
    """
    if os.environ.get("DQE_TESTS_KEEP") == "0" or not os.access(REPOSITORY, os.W_OK):
        return shared(factory, f"{name}-{key}", make)
    folder = _KEPT / f"{name}-{key}"
    if not folder.is_dir():
        _remove_old()
    return _made_once(folder, name, make)


def digest_of(*parts: str | bytes, files: Iterable[Path] = ()) -> str:
    """A key for `kept`: equal for equal texts and equal contents of the files."""
    found = hashlib.sha256()
    for part in (*parts, *(file.read_bytes() for file in files)):
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:32]


def _made_once(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / name, folder / "done"
    with directory_lock(folder):
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)
            make(path)
        done.touch()  # each time, so that what is used is not old
    return path


def _remove_old() -> None:
    """The folders stay, empty, so that whoever waits for the lock of one finds it."""
    for folder in _KEPT.glob("*"):
        with directory_lock(folder):
            done = folder / "done"
            if done.exists() and done.stat().st_mtime < time.time() - _DAYS * 86400:
                done.unlink()
                for rest in folder.iterdir():
                    shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
