"""Shared fixtures of the export tests: one checkpoint, and the one bundle that is really traced from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.tiny_training import model_config, one_cpu_thread, write_checkpoint, write_tiny_garments

from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER
from dqe_training.config import VisionConfig


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its texts are longer than any shape that does not depend on the model."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", model_config(max_text_length=40))


@pytest.fixture(scope="session")
def bundle_path(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by dqe-export itself. Tests only read it."""
    from dqe_export.cli.export import main

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    with one_cpu_thread():
        assert main([str(checkpoint_path), str(out), "--name", "tiny"]) == 0
    return out


@pytest.fixture(scope="session")
def upstream_path(checkpoint_path: Path, bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of `bundle_path` with upstream's cross-attention, which int8 is made from. Tests only read them."""
    from dqe_export.onnx_graph import export_graph
    from dqe_training.checkpoint import load_checkpoint
    from dqe_training.model.cross_attention import upstream_attention

    out, model = tmp_path_factory.mktemp("upstream"), load_checkpoint(checkpoint_path).model
    with upstream_attention(model.qformer):
        for spec in (QUERY_ENCODER, TARGET_ENCODER):
            export_graph(spec, model, out / spec.file)
    for spec in (VISION_ENCODER, ATTRIBUTE_HEADS):  # which have none
        shutil.copy(bundle_path / spec.file, out)
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
