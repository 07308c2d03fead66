"""Wheels of NVIDIA's that the tests unpack instead of installing them: bindings without the libraries behind them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dqe_engine.files import directory_lock

FOLDER = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "nvidia-bindings"


def fetch(requirement: str) -> Path:
    """The unpacked wheel, downloaded once; the test is skipped where that is not possible."""
    folder = FOLDER / f"{requirement}-{sys.version_info[0]}{sys.version_info[1]}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with directory_lock(FOLDER):  # from other workers
        if not folder.exists():
            partial = FOLDER / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20",
                       "--disable-pip-version-check", "--target", str(partial), requirement]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
            partial.rename(folder)
    return folder
