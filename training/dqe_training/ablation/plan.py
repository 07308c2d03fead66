"""The cells of an ablation: every arm (a variant at a point of the grid) with every seed, known by what they train."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import InputError
from dqe_engine.files import sha256_of

from ..checkpointing.meta import WEIGHTS
from ..checkpointing.start import read_start
from ..config import TrainConfig, override
from .source_hash import source_hash
from .variants import Point, apply_variant, parse_variant, point_label

Budget = Literal["steps", "seconds"]
SCHEMA_VERSION = 3
"""Of cells, which are known by it too. Version 2 had no `kind`."""
VISION_FILE = "vision.safetensors"
"""The weights in a `dqe-pretrain` output directory."""


@dataclass(frozen=True)
class Arm:
    """One row of the table. `config` but for its seed."""

    label: str
    config: TrainConfig


@dataclass(frozen=True)
class Cell:
    """One training. `key` says what is trained and evaluated, on what, by which code: an equal key is an equal cell."""

    arm: str
    seed: int
    config: TrainConfig
    key: str


@dataclass(frozen=True)
class Plan:
    """`arms`: the first is what the others are compared with. `left_out`: points that no configuration can have, and why."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    budget: Budget
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]


def make_plan(
    config: TrainConfig, variants: Sequence[str], seeds: Sequence[int], *, budget: Budget, identity: str, points: Sequence[Point] = ((),)
) -> Plan:
    """Cells seed by seed, so that an interrupted plan has compared all arms on the seeds that it finished.

    `identity` of the data. A variant that a grid does not touch is one arm. Raises InputError.
    """
    if repeated := {name for name in (*variants, *map(str, seeds)) if [*variants, *map(str, seeds)].count(name) > 1}:
        raise InputError(f"{min(repeated)} is given twice among the variants or seeds; name it once")
    config = _with_budget(config, budget)
    made: list[tuple[str, Point, TrainConfig]] = []
    left_out: list[str] = []
    for point in points:
        try:
            at_point = override(config, point, where=point_label(point))
        except InputError as error:
            left_out.append(str(error))
            continue
        made += [(name, point, apply_variant(at_point, parse_variant(name), name=name)) for name in variants]
    if not made:
        raise InputError(f"--sweep: no point is a valid configuration; the first: {left_out[0]}")
    arms: dict[TrainConfig, Arm] = {}
    for name, point, wanted in made:
        moves = len({other for same, _, other in made if same == name}) > 1
        arm = Arm(f"{name} {point_label(point)}" if moves else name, wanted)
        if arms.setdefault(wanted, arm).label != arm.label:
            raise InputError(f"{arm.label} and {arms[wanted].label} train the same; leave one out")
    return plan_of(tuple(arms.values()), seeds, budget=budget, identity=identity, left_out=tuple(left_out))


def plan_of(arms: Sequence[Arm], seeds: Sequence[int], *, budget: Budget, identity: str, left_out: tuple[str, ...] = ()) -> Plan:
    """A plan of arms that are configured already, each with a label of its own."""
    cells = tuple(_cell(arm, seed, identity) for seed in seeds for arm in arms)
    return Plan(tuple(arms), tuple(seeds), budget, cells, left_out)


def _with_budget(config: TrainConfig, budget: Budget) -> TrainConfig:
    optim = config.optim
    if budget == "seconds":
        if optim.seconds <= 0:
            raise InputError("--budget seconds needs the length of a training; add optim.seconds=60, for example")
        return config
    if optim.epochs < 1 and not optim.steps:
        raise InputError(f"--budget steps: optim.epochs must be at least 1, got {optim.epochs}")
    return msgspec.structs.replace(config, optim=msgspec.structs.replace(optim, seconds=0.0))


def _weights(config: TrainConfig) -> str:
    """SHA-256 of the weights that a training begins with: the configuration has only their place. Empty for those that ship, and for a
    backbone, which is too large to be read for every plan."""
    if config.start:
        return read_start(config.start).file(WEIGHTS).sha256
    vision = Path(config.vision_weights, VISION_FILE)
    return sha256_of(vision) if config.vision_weights and vision.is_file() else ""


def _cell(arm: Arm, seed: int, identity: str) -> Cell:
    config = msgspec.structs.replace(arm.config, optim=msgspec.structs.replace(arm.config.optim, seed=seed))
    digest = hashlib.sha256(to_json((SCHEMA_VERSION, source_hash(), identity, _weights(config), config)))
    return Cell(arm.label, seed, config, digest.hexdigest()[:32])
