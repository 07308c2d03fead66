"""Shared fixtures of the benchmarks' tests: a checkpoint, the bundle exported from it, and a dataset, as one setting."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_exports import tiny_checkpoint, tiny_export, tiny_garments
from support.tiny_training import one_cpu_thread

from benchmarks.isolated import OwnProcess
from benchmarks.serving.checks import write_truth
from benchmarks.serving.setting import Setting, open_setting, prepare


@pytest.fixture(autouse=True, scope="session")
def _traced_once(graphs_traced_once: None) -> None:
    pass


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves it: bundle, checkpoint and garments."""
    folder = tmp_path_factory.mktemp("served")
    for name, made in (("model", tiny_checkpoint), ("garments", tiny_garments), ("bundle", tiny_export)):
        (folder / name).symlink_to(made(tmp_path_factory), target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def setting(served: Path) -> Setting:
    """Prepared, without int8, with the true scores written. Tests only read it."""
    opened = open_setting(served / "bundle", served / "model", served / "garments", served / "work", items=50, pool=12, threads=1)
    prepared = prepare(opened, lambda text: None, int8=False)
    with one_cpu_thread():
        write_truth(prepared)
    return prepared


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders' own processes are forks of one that has imported PyTorch and transformers, which takes each of them six seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dqe_training.checkpointing.checkpoint"])
    monkeypatch.setattr(OwnProcess, "context", context)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with one_cpu_thread():
        yield
