"""AdamW with rates of their own for the vision tower and the attribute heads, and the warm-up and cosine schedule."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from ..backbone.weights import TEMPERATURE
from ..config import OptimConfig
from ..model import DQEModel


def build_optimizer(model: DQEModel, config: OptimConfig, beside: nn.Module | None = None, *, temperature: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of the model, and of what trains `beside` it. Vectors (biases, norms) are not decayed unless
    `decay_vectors`, and a learned τ never is. Group key `peak` is the full rate.

    A learned τ is kept as the logarithm of τ / `temperature`. Adam moves any parameter by about its rate a step, so this one has the
    rate `learning_rate` / `temperature`: τ then moves by about `learning_rate` a step, as it does where τ itself is the parameter (SPRC,
    QuRe). The two are the same to first order: ours moves by τ / `temperature` times as much.
    """
    rates = {
        "vision_model": config.vision_learning_rate,
        "attribute_heads": config.heads_learning_rate or config.learning_rate,
        TEMPERATURE: config.learning_rate / temperature,
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    named = itertools.chain(model.named_parameters(), beside.named_parameters() if beside is not None else ())
    for name, parameter in sorted(named, key=lambda pair: pair[0] == TEMPERATURE):  # τ last: `set_rate` returns the first group's rate
        if parameter.requires_grad:
            rate = rates.get(name.partition(".")[0], config.learning_rate)
            decayed = parameter.ndim >= 2 or (config.decay_vectors and name != TEMPERATURE)
            groups.setdefault((rate, decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "peak": rate,
            }
            for (rate, decayed), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, fraction: float) -> float:
    """Set every group's rate for `fraction` of the training done, in [0, 1]; returns the first one: the heads' where they train alone,
    else `learning_rate`'s."""
    warm = min(1.0, (fraction + 1e-4) / config.warmup_share) if config.warmup_share else 1.0
    scale = warm * (config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * fraction)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    rate: float = optimizer.param_groups[0]["lr"]
    return rate
