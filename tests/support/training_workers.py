"""Workers that train and are killed (tests/training/test_kill.py)."""

from __future__ import annotations

from pathlib import Path

from support.dying import die_before_change
from support.fork_server import Tasks
from support.tiny_training import load_tiny, make_trainer, train_config

from dqe_training.checkpointing.checkpoint import Progress, load_checkpoint, save_checkpoint
from dqe_training.evaluation.split import EvaluationSplit
from dqe_training.run.trainer import finish_run
from dqe_training.run.validation import Validation

CONFIG = train_config(epochs=12, checkpoint_every=1)


def train(data: str, run: str, model: str) -> None:
    """What dqe-train does: train, resuming what is there, then put the finished model in its place."""
    triplets, pixels, _ = load_tiny(Path(data))
    validation = Validation(EvaluationSplit.of_folder(Path(data)), every=7)
    make_trainer(CONFIG, triplets, pixels, Path(run), validation=validation).train()
    finish_run(Path(run), Path(model), replace=True)


def replace_and_die(checkpoint: str, die_before: int) -> None:
    """Replace a checkpoint, and die by SIGKILL just before the n-th rename of it."""
    loaded = load_checkpoint(Path(checkpoint))
    die_before_change(die_before, ("replace",))
    progress = Progress(step=loaded.meta.progress.step, finished=True)
    save_checkpoint(Path(checkpoint), loaded.model, loaded.tokenizer, config=loaded.meta.config, progress=progress, replace=True)


TASKS: Tasks = {"train": train, "replace_and_die": replace_and_die}
