"""Shared fixtures of the export tests: one checkpoint, and the one bundle that is really traced from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_training import one_cpu_thread, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def bundle_path(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by dqe-export itself. Tests only read it."""
    from dqe_export.cli.export import main

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    with one_cpu_thread():
        assert main([str(checkpoint_path), str(out), "--name", "tiny"]) == 0
    return out


@pytest.fixture
def one_thread() -> Iterator[None]:
    with one_cpu_thread():
        yield
