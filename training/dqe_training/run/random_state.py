"""The random numbers that dropout draws: their state, so that what was drawn once can be drawn again."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the CPU's generator and, on a GPU, of its own: 1-D uint8 tensors by name."""
    state = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse; other keys of `state` are passed over."""
    torch.set_rng_state(state["rng"].to(torch.uint8))
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"].to(torch.uint8), device)
