"""How many steps of the baseline take as long as a training of DQE-CIR."""

from __future__ import annotations

from dataclasses import dataclass

from dqe_training.config import TrainConfig


@dataclass(frozen=True)
class Costs:
    """What DQE-CIR's training consists of, in steps of the baseline: a step without a mined negative, one with, and a refresh of TRNS
    for 1,000 triplets, with half as many images. Medians in turns on two idle cores: `python -m benchmarks.equal_time`."""

    plain: float = 1.07
    with_negative: float = 1.28
    refresh: float = 3.0


def baseline_steps(config: TrainConfig, triplets: int, costs: Costs = Costs()) -> int:
    """Steps of the baseline, in batches of the same size, in the time of `config`'s training on so many triplets.

    A number instead of a clock: other work on the machine slows one of two trainings down more than the other, and gave the baseline
    between 186 and 583 steps beside the same 374.
    """
    optim, trns = config.optim, config.trns
    per_epoch = triplets // optim.batch_size
    steps = optim.steps or optim.epochs * per_epoch
    if not trns.enabled:
        return round(costs.plain * steps)
    warmup = min(trns.warmup_epochs * per_epoch, steps)
    plain = 0 if trns.warmup == "random" else warmup
    refreshes = -(-(steps - warmup) // (trns.interval * per_epoch))
    return round(costs.plain * plain + costs.with_negative * (steps - plain) + costs.refresh * triplets / 1000 * refreshes)
