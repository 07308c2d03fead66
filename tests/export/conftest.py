"""Shared fixtures of the export tests: one checkpoint and the bundle exported from it, and what is traced is traced once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.shared import shared
from support.tiny_bundle import build_tiny_bundle
from support.tiny_exports import tiny_checkpoint, tiny_export, tiny_garments
from support.tiny_training import model_config, one_cpu_thread, write_checkpoint

from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, VISION_ENCODER
from dqe_training.config import VisionConfig


@pytest.fixture(autouse=True, scope="session")
def _traced_once(graphs_traced_once: None) -> None:
    pass


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its texts are longer than any shape that does not depend on the model."""
    return tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by dqe-export itself. Tests only read it."""
    return tiny_export(tmp_path_factory)


@pytest.fixture(scope="session")
def upstream_path(checkpoint_path: Path, bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of `bundle_path` with upstream's cross-attention, which int8 is made from. Tests only read them."""
    from dqe_export.onnx_graph import export_graph
    from dqe_training.checkpointing.checkpoint import load_checkpoint
    from dqe_training.model.cross_attention import upstream_attention

    out, model = tmp_path_factory.mktemp("upstream"), load_checkpoint(checkpoint_path).model
    with upstream_attention(model.qformer):
        for spec in GRAPHS:
            if spec in (VISION_ENCODER, ATTRIBUTE_HEADS):  # which have none
                shutil.copy(bundle_path / spec.file, out)
            else:
                export_graph(spec, model, out / spec.file)
    return out


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that weights, not headers, make a graph's size."""
    config = model_config(hidden_size=128, embedding_dim=32, query_tokens=8)
    config = msgspec.structs.replace(config, vision=VisionConfig(hidden_size=64, layers=2, heads=2, patch_size=8))
    return shared(tmp_path_factory, "wide", lambda path: write_checkpoint(path, config))


@pytest.fixture(scope="session")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_garments(tmp_path_factory)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with one_cpu_thread():
        yield


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A tiny bundle that the test may change."""
    return build_tiny_bundle(tmp_path / "bundle")
