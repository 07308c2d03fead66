"""Shared fixtures of the export tests: one checkpoint, and the one bundle that is really traced from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.tiny_training import model_config, one_cpu_thread, write_checkpoint, write_tiny_garments

from dqe_training.config import VisionConfig


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


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that weights, not headers, make a graph's size."""
    config = model_config(hidden_size=128, embedding_dim=32, query_tokens=8)
    config = msgspec.structs.replace(config, vision=VisionConfig(hidden_size=64, layers=2, heads=2, patch_size=8))
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "model", config)


@pytest.fixture(scope="session")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_garments(tmp_path_factory.mktemp("data") / "garments")


@pytest.fixture
def one_thread() -> Iterator[None]:
    with one_cpu_thread():
        yield
