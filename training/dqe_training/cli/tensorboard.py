"""The optional TensorBoard writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dqe_engine.errors import BackendError

from ..encoding import Listener


def with_tensorboard(listener: Listener, directory: Path) -> Listener:
    """A listener that also writes scalars. Raises BackendError when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackendError("--tensorboard: TensorBoard is not installed; pip install tensorboard, or leave the option out") from error
    writer = SummaryWriter(str(directory))

    def listen(event: dict[str, Any]) -> None:
        listener(event)
        if event["event"] in ("step", "validation"):
            for name, value in event.items():
                if name.startswith(("loss/", "val/")) or name in ("learning_rate", "triplets_per_second"):
                    writer.add_scalar(name, value, event["step"])
            writer.flush()

    return listen
