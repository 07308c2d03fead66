"""Shared fixtures of the training tests: one CPU thread, and one tiny garments dataset for the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_exports import tiny_garments
from support.tiny_training import load_tiny, one_cpu_thread

from dqe_training.data.triplets import TripletData


@pytest.fixture(autouse=True, scope="module")
def _one_cpu_thread() -> Iterator[None]:
    with one_cpu_thread():
        yield


@pytest.fixture(scope="session")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder that tests only read."""
    return tiny_garments(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_data(garments: Path) -> tuple[TripletData, NDArray[np.uint8]]:
    data, pixels, _ = load_tiny(garments)
    return data, pixels
