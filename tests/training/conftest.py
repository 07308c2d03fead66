"""Shared fixtures of the training tests: one thread, and one tiny garments dataset for the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.tiny_training import load_tiny, write_tiny_garments

from dqe_training.data.triplets import TripletData


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit-for-bit repeatable sums, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder that tests only read."""
    return write_tiny_garments(tmp_path_factory.mktemp("garments") / "data")


@pytest.fixture(scope="session")
def tiny_data(garments: Path) -> tuple[TripletData, NDArray[np.uint8]]:
    data, pixels, _ = load_tiny(garments)
    return data, pixels
