"""A checkpoint, the bundle exported from it and a dataset, each made once for a run: tests only read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.shared import shared
from support.tiny_training import model_config, one_cpu_thread, write_checkpoint, write_tiny_garments


def tiny_checkpoint(factory: pytest.TempPathFactory) -> Path:
    """Its texts are longer than any shape that does not depend on the model."""
    return shared(factory, "model", lambda out: write_checkpoint(out, model_config(max_text_length=40)))


def tiny_garments(factory: pytest.TempPathFactory) -> Path:
    return shared(factory, "garments", write_tiny_garments)


def tiny_export(factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint`, written by dqe-export itself."""
    checkpoint = tiny_checkpoint(factory)

    def export(out: Path) -> None:
        from dqe_export.cli.export import main

        with one_cpu_thread():
            assert main([str(checkpoint), str(out), "--name", "tiny"]) == 0

    return shared(factory, "tiny", export)
