"""Published files of tiny models, imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import published_models as files
from support.published_models import Size

from dqe_training.checkpointing.checkpoint import Checkpoint, load_checkpoint
from dqe_training.importing import ImportOptions, import_model

NAMES = {"lavis": "blip2_pretrained.pth", "sprc": "sprc_cirr.pt", "spn4cir": "best.pt", "qure": "model.pth"}


def options(folder: Path, size: Size, **other: Any) -> ImportOptions:
    vocabulary = files.write_vocabulary(folder / "vocab.txt", size.words)
    return ImportOptions(tokenizer=str(vocabulary), **{"vision_heads": size.heads, "qformer_heads": size.qformer_heads} | other)


def imported(folder: Path, layout: str, size: Size, **saving: Any) -> tuple[Checkpoint, files.State]:
    state = files.save(layout, folder / NAMES[layout], size, **saving)
    plan, _ = import_model(folder / NAMES[layout], folder / "out", options(folder, size))
    assert plan.layout.name == layout
    return load_checkpoint(folder / "out"), state
