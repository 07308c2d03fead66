"""BLIP-2 checkpoints as their authors publish them: found, described, and loaded into the model.

Torch-free: `weights` and `tokenizer` are imported by who loads.
"""

from .describe import describe_backbone
from .find import find_backbone

__all__ = ["describe_backbone", "find_backbone"]
