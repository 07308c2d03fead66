"""Shared fixtures: fixed seeds, the public datasets' files, and skipping with the reason where a machine lacks something.

The header says what the machine is, so that a red run on another processor explains itself.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.fork_server import ForkServer

from benchmarks.machine import cuda_devices
from dqe_engine.doctor import describe, first_lines
from dqe_engine.processors import available_cpus

if TYPE_CHECKING:
    from support.fake_cuda import FakeCuda
    from support.fake_tensorrt import FakeTensorRT

REPOSITORY = Path(__file__).resolve().parents[1]


def _realdata_folder() -> Path:
    return Path(os.environ.get("DQE_REALDATA", REPOSITORY.parent / "shared" / "data"))


_cuda_devices = cache(cuda_devices)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The processors that the container gives; no more than eight, since each worker imports everything and takes gigabytes."""
    return min(available_cpus(), 8)


def pytest_report_header() -> list[str]:
    return first_lines(describe())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("realdata") and not _realdata_folder().is_dir():
        pytest.skip(f"no public dataset files at {_realdata_folder()}; set DQE_REALDATA")
    if item.get_closest_marker("gpu") and _cuda_devices() == 0:
        if os.environ.get("DQE_REQUIRE_GPU"):
            pytest.fail("DQE_REQUIRE_GPU is set, and no CUDA device is found (libcuda.so.1 missing, or it shows none)")
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of the public datasets' files; use it with the marker of the same name."""
    return _realdata_folder()


@pytest.fixture(scope="session")
def graphs_traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exports trace equal models once, from here to the end of the run: support/traced_once.py."""
    from support.traced_once import traced_once  # imports torch

    with traced_once(tmp_path_factory):
        yield


@pytest.fixture(scope="session")
def torch_workers() -> Iterator[ForkServer]:
    """Forks workers of support/torch_workers.py. It starts when the first test asks for it."""
    with ForkServer(Path(__file__).parent / "support" / "torch_workers.py") as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray with four places for workers on this machine; started once, since that takes longer than what the tests do."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else 15: on a busy machine, actors get next to nothing, and nothing is ever in time
        for attempt in range(3):
            try:
                ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=100 << 20)
                break
            except Exception as error:  # what Ray raises where a busy machine takes more than 30 s
                ray.shutdown()
                if "timed out" not in str(error) or attempt == 2:
                    raise
        yield
        ray.shutdown()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A device beneath NVIDIA's bindings that is none."""
    from support.fake_cuda import FakeCuda

    return FakeCuda().install(monkeypatch)


@pytest.fixture
def trt(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """TensorRT for that device."""
    from support.fake_tensorrt import FakeTensorRT

    return FakeTensorRT(cuda).install(monkeypatch)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
