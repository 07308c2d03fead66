"""The optimiser's groups: rates, decay and betas, the speed of a learned temperature, and state of other groups refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from support.tiny_training import make_model, model_config

from dqe_engine.errors import CheckpointError
from dqe_training.backbone.weights import TEMPERATURE
from dqe_training.checkpointing.checkpoint import optimizer_tensors, restore_optimizer
from dqe_training.config import OptimConfig
from dqe_training.model import DQEModel
from dqe_training.run.optim import build_optimizer, set_rate

LEARNED = msgspec.structs.replace(model_config(), learned_temperature=True)


def pull(tau: torch.Tensor, step: int) -> torch.Tensor:
    """A loss whose gradient by τ keeps its sign for most steps, and changes in size."""
    return (tau - 0.06) ** 2 * (1 + step % 3)


def test_a_learned_temperature_moves_as_fast_as_if_it_were_the_parameter_itself() -> None:
    """At the whole rate of a training on FashionIQ, which moves τ by more than half of itself: with the rate of the other parameters, its
    logarithm would move τ by 1 %."""
    rate, steps, start = 5e-5, 200, 0.07
    config = OptimConfig(learning_rate=rate, weight_decay=0.0)
    model = make_model(LEARNED)
    ours = build_optimizer(model, config, temperature=start)
    set_rate(ours, msgspec.structs.replace(config, warmup_share=0.0), 0.0)
    plain = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([plain], lr=rate, betas=config.betas, weight_decay=0.0)
    for step in range(steps):
        for optimizer, tau in ((ours, model.temperature(start)), (theirs, plain)):
            optimizer.zero_grad()
            pull(torch.as_tensor(tau), step).backward()
            optimizer.step()
    moved, expected = torch.as_tensor(model.temperature(start)).item() - start, plain.item() - start
    assert expected < -100 * rate
    assert moved == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("heads_alone", [False, True])
def test_the_rate_that_is_told_is_not_the_temperatures(heads_alone: bool) -> None:
    model = make_model(LEARNED)
    if heads_alone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith((TEMPERATURE, "text_projection"))
    config = OptimConfig(learning_rate=2e-3, warmup_share=0.0)
    optimizer = build_optimizer(model, config, temperature=0.05)
    assert set_rate(optimizer, config, 0.0) == pytest.approx(2e-3)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(2e-3 / 0.05)


def groups(model: DQEModel, **settings: Any) -> dict[str, tuple[float, tuple[float, float]]]:
    """Parameter → its decay and betas."""
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, **settings), temperature=0.07)
    found = {id(p): (group["weight_decay"], group["betas"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_vectors_are_decayed_and_betas_changed_only_where_asked() -> None:
    model = make_model(LEARNED)
    plain, asked = groups(model), groups(model, decay_vectors=True, betas=(0.8, 0.999))
    bias = next(name for name, p in model.named_parameters() if p.ndim == 1 and p.requires_grad)
    assert plain[bias] == (0.0, (0.9, 0.98))
    assert plain["query_tokens"] == (0.3, (0.9, 0.98))
    assert asked.pop(TEMPERATURE) == (0.0, (0.8, 0.999))
    assert set(asked.values()) == {(0.3, (0.8, 0.999))}


def test_state_of_parameters_in_another_order_is_refused() -> None:
    """As a version wrote it that kept the temperature among the other vectors."""
    first, second = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), ()))
    written = torch.optim.AdamW([second, first])
    (first.sum() + second).backward()
    written.step()
    with pytest.raises(CheckpointError, match=r"parameter 0 has shape \(\), expected \(3,\): another version grouped"):
        restore_optimizer(torch.optim.AdamW([first, second]), optimizer_tensors(written))
    restore_optimizer(torch.optim.AdamW([second, first]), optimizer_tensors(written))
