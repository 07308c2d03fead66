"""What an ablation trains: the parts of the method switched on and off, and the points of a grid of settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import msgspec

from dqe_engine.errors import InputError

from ..config import LossConfig, TrainConfig, TRNSConfig

PARTS = ("kl", "law", "trns")
_NAME = re.compile(r"(baseline|full)?((?:[+-](?:kl|law|trns))*)")
_SIGNED = re.compile(r"([+-])(\w+)")

Point = tuple[str, ...]
"""Assignments `section.key=value` that are made together."""


def parse_variant(name: str) -> frozenset[str]:
    """The parts that a variant has: `baseline` none, `full` all, `+kl` the baseline with KL, `full-trns` all but TRNS.

    Raises InputError.
    """
    found = _NAME.fullmatch(name)
    if not name or found is None:
        raise InputError(f"variant {name!r}: expected baseline, full, +{', +'.join(PARTS)}, or one of these with parts added or taken away")
    parts = set(PARTS) if found[1] == "full" else set()
    for sign, part in _SIGNED.findall(found[2]):
        if (part in parts) == (sign == "+"):
            raise InputError(f"variant {name!r}: {part} is {'in it already' if sign == '+' else 'not in it'}")
        (parts.add if sign == "+" else parts.remove)(part)
    return frozenset(parts)


def apply_variant(config: TrainConfig, parts: frozenset[str], *, name: str) -> TrainConfig:
    """`config` with just these parts. Settings of a part that is off are set to their defaults, so that configurations
    which train alike are equal.

    kl: the KL relevance loss, else InfoNCE. law: attribute weights, with the attribute margin and presence losses. trns: mined
    negatives with the ranking loss. Raises InputError where a part would change nothing.
    """
    if config.encoder_frozen and "law" not in parts:
        raise InputError(f"variant {name!r}: without law nothing would train, since finetune is attributes; name variants with law")
    loss, defaults = config.loss, LossConfig()
    if "kl" in parts:
        _refuse(loss.relevance_share == 0, name, "kl", "loss.relevance_share is 0")
        loss = msgspec.structs.replace(loss, objective="kl")
    else:
        kept = {key: getattr(defaults, key) for key in ("relevance_temperature", "relevance_share", "relevance_warmup")}
        loss = msgspec.structs.replace(loss, objective="infonce", **kept)
    if "law" not in parts:
        loss = msgspec.structs.replace(loss, attribute_weight=0.0, presence_weight=0.0, attribute_margin=defaults.attribute_margin)
    if "trns" in parts:
        _refuse(loss.rank_weight == 0, name, "trns", "loss.rank_weight is 0")
        trns = msgspec.structs.replace(config.trns, enabled=True)
    else:
        loss, trns = msgspec.structs.replace(loss, rank_weight=0.0), TRNSConfig(enabled=False)
    model = msgspec.structs.replace(config.model, attribute_weights="law" in parts)
    return msgspec.structs.replace(config, model=model, loss=loss, trns=trns)


def _refuse(idle: bool, name: str, part: str, why: str) -> None:
    if idle:
        raise InputError(f"variant {name!r}: {part} would change nothing, since {why}")


def parse_sweep(axes: Sequence[str]) -> tuple[Point, ...]:
    """The grid of `section.key=v1,v2,...` axes, the last one running fastest; one empty point without axes.

    Raises InputError for more than two axes, for a key twice or for one without values.
    """
    if len(axes) > 2:
        raise InputError(f"--sweep: {len(axes)} keys; a grid has one or two")
    lines: list[list[str]] = []
    for axis in axes:
        key, separator, values = axis.partition("=")
        if not (key and separator) or not all(values.split(",")):
            raise InputError(f"--sweep {axis!r}: expected section.key=value,value,..., for example trns.zones.hi=0.01,0.02,0.05")
        lines.append([f"{key}={value}" for value in values.split(",")])
    if len(lines) == 2 and axes[0].partition("=")[0] == axes[1].partition("=")[0]:
        raise InputError(f"--sweep: {axes[0].partition('=')[0]} is there twice")
    return tuple(itertools.product(*lines))


def point_label(point: Point) -> str:
    """`lo=0.002 hi=0.02`: the last words of the keys, with their values."""
    pairs = (assignment.partition("=") for assignment in point)
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)
