"""Shared fixtures: one tiny bundle for the run, and a folder of photos."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.engine import RetrievalEngine


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def engine(bundle_path: Path) -> RetrievalEngine:
    """A fresh engine with an empty index, cheap for this bundle."""
    return RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
