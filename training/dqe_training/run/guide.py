"""The guide of the margin filter: the checkpoint that training began with, as it was (`loss.filter_guide`)."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpointing.checkpoint import load_checkpoint
from ..checkpointing.start import start_directory
from ..config import TrainConfig
from ..model import DQEModel


def load_guide(config: TrainConfig, device: torch.device) -> DQEModel | None:
    """The model of `config.start`, in evaluation mode and without gradients, for image tokens of the tower that both have; None where
    the filter has no such guide. It costs a second pass of the Q-Former over queries and targets. Raises CheckpointError."""
    if config.loss.filter_guide != "start":
        return None
    guide = load_checkpoint(start_directory(config.start), as_stored=True).model
    guide.vision_model = nn.Identity()
    return guide.requires_grad_(False).to(device)
