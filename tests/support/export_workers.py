"""Workers that export and are killed (tests/export/test_kill.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from support.dying import die_before_change
from support.fork_server import Tasks
from support.replayed_export import replay

from dqe_engine.contracts.graphs import GRAPHS
from dqe_export import bundle
from dqe_export.bundle import export_bundle
from dqe_training.checkpointing.checkpoint import load_checkpoint


def export_forever(checkpoint: str, out: str, traced: str) -> None:
    """Export over and over, each time replacing the bundle."""
    _spare_time(traced)
    loaded = load_checkpoint(Path(checkpoint))
    while True:
        export_bundle(loaded, Path(out), force=True)


def export_once(checkpoint: str, out: str, traced: str, die_before: int = 0) -> None:
    """Export and replace; with `die_before`, die by SIGKILL just before the n-th rename."""
    _spare_time(traced)
    die_before_change(die_before, ("replace",))
    export_bundle(load_checkpoint(Path(checkpoint)), Path(out), force=True)


def _spare_time(traced: str) -> None:
    """Nothing is traced or timed, which takes most of an export and touches no file."""
    torch.onnx.export = replay(Path(traced))
    bundle.time_graphs = lambda *_: ({spec.name: () for spec in GRAPHS}, None)


TASKS: Tasks = {"export_forever": export_forever, "export_once": export_once}
