"""Training and evaluation of DQE-CIR models. What follows is what users call; each name is imported when it is first asked for, so that
importing the package loads no PyTorch.

    config = load_config("garments", ["optim.epochs=5"])
    source, run = DataSource.from_directory(Path("data/garments")), Path("runs/mine")
    train_run(config, source, run, validation=Validation(EvaluationSplit.of_folder(Path("data/garments"))))
    figures = judge_checkpoint(run / "best", EvaluationSplit.of_folder(Path("data/garments"), "test"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpointing.checkpoint import Checkpoint, load_checkpoint
    from .config import TrainConfig
    from .evaluation.split import EvaluationSplit, judge, judge_checkpoint
    from .run.configuration import load_config
    from .run.trainer import Trainer, finish_run
    from .run.validation import Validation
    from .run.workflow import DataSource, train_run

_HOMES = {
    "Checkpoint": "checkpointing.checkpoint",
    "DataSource": "run.workflow",
    "EvaluationSplit": "evaluation.split",
    "TrainConfig": "config",
    "Trainer": "run.trainer",
    "Validation": "run.validation",
    "finish_run": "run.trainer",
    "judge": "evaluation.split",
    "judge_checkpoint": "evaluation.split",
    "load_checkpoint": "checkpointing.checkpoint",
    "load_config": "run.configuration",
    "train_run": "run.workflow",
}

__all__ = [
    "Checkpoint", "DataSource", "EvaluationSplit", "TrainConfig", "Trainer", "Validation", "finish_run", "judge", "judge_checkpoint",
    "load_checkpoint", "load_config", "train_run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
