"""Shared fixtures of the training tests: one CPU thread, and one tiny garments dataset for the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_exports import tiny_garments
from support.tiny_training import load_tiny, one_cpu_thread

from dqe_training.data.triplets import TripletData

if TYPE_CHECKING:
    from transformers import Blip2ForImageTextRetrieval


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


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Blip2ForImageTextRetrieval]:
    """A tiny BLIP-2 as it is published, and upstream's model. Tests only read it."""
    from support.tiny_blip2 import write_blip2

    directory = tmp_path_factory.mktemp("blip2") / "tiny"
    return directory, write_blip2(directory)


@pytest.fixture
def copy(published: tuple[Path, Blip2ForImageTextRetrieval], tmp_path: Path) -> Path:
    """A copy of `published` that the test may change."""
    return shutil.copytree(published[0], tmp_path / "copy")
