"""What is expensive to make and only read: made once for a run of pytest, by whichever of its workers asks first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dqe_engine.files import directory_lock


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make(path)` writes at `path`, which is the same in every worker. The others wait while one makes it.

    Where making it fails, what is half made is not taken for whole: whoever asks next tries again, and fails by itself.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own within the run's
        root = root.parent
    folder = root / "shared" / name
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / name, folder / "done"
    with directory_lock(folder):
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)
            make(path)
            done.touch()
    return path
