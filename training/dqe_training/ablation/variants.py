"""What an ablation trains: the parts of the method switched on and off, and the points of a grid of settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

from ..checkpointing.start import read_start
from ..config import BaseQuery, LossConfig, ModelConfig, TrainConfig, TRNSConfig

ZONES = {
    "pooled": ZoneSpec(lo=0.002, hi=0.02, bounds="pooled"),
    "absolute": ZoneSpec(lo=0.05, hi=0.3),
    "rank": ZoneSpec(lo=0.002, hi=0.02, bounds="rank"),
    "random": ZoneSpec(lo=-2.0, hi=2.0),
    "filtered": ZoneSpec(lo=0.0, hi=2.0, policy="hardest"),
}
"""Where the options of `trns` draw negatives from; scores are cosines, so no Δ is beyond 2. pooled, absolute: zones relative to the target.
rank: ranks of the query's own list, as ANCE (arXiv 2007.00808) does. random: anywhere. filtered: the hardest that score below the target,
after GISTEmbed's filter (arXiv 2402.16829), with the model as its own guide."""

PARTS: dict[str, tuple[str, ...]] = {
    "pool": (),
    "cls": (),
    "twopass": (),
    "kl": ("uniform",),
    "law": ("text", "image", "unlabelled", "constant"),
    "trns": (*ZONES, "two-drops"),
    "sprc": ("prompt", "align"),
    "pairwise": (),
    "gist": ("absolute", "relative"),
}
"""The parts of a variant and the options that each has."""
_BASES: Mapping[str, BaseQuery] = {"pool": "pool", "cls": "cls", "twopass": "two_pass"}
"""The base queries that are parts; the baseline's is the mean."""
_NO_LABEL = ("unlabelled", "constant")
"""The options of law whose losses read no label."""
_OF_KL = ("relevance_temperature", "relevance_share", "relevance_warmup", "relevance_spread")
_FULL = ("kl", "law", "trns")
_NAME = re.compile(r"(baseline|full)?((?:[+-][a-z]+(?::[a-z-]+)?)*)")
_SIGNED = re.compile(r"([+-])([a-z]+)(?::([a-z]+(?:-[a-z]+)*))?(?=[+-]|$)")

Point = tuple[str, ...]
"""Assignments `section.key=value` that are made together."""
Variant = Mapping[str, str]
"""The parts that a variant has, each with its option; an empty one is the configuration's own setting."""


def parse_variant(name: str) -> Variant:
    """The parts that a variant has: `baseline` none, `full` kl, law and trns, `+kl` the baseline with KL, `full-trns` all but TRNS,
    `+trns:random` random negatives in its place. Raises InputError.
    """
    found = _NAME.fullmatch(name)
    signed = _SIGNED.findall(found[2]) if found else []
    if not name or found is None or "".join(f"{s}{p}{':' + o if o else ''}" for s, p, o in signed) != found[2]:
        raise InputError(f"variant {name!r}: expected baseline, full, +{', +'.join(PARTS)}, or one of these with parts added or taken away")
    parts = dict.fromkeys(_FULL, "") if found[1] == "full" else {}
    for sign, part, option in signed:
        if part not in PARTS:
            raise InputError(f"variant {name!r}: no part {part!r}; parts are {', '.join(PARTS)}")
        if option and option not in PARTS[part]:
            offered = f"its options are {', '.join(PARTS[part])}" if PARTS[part] else "it has no options"
            raise InputError(f"variant {name!r}: {part} has no option {option!r}; {offered}")
        if (part in parts) == (sign == "+"):
            raise InputError(f"variant {name!r}: {part} is {'in it already' if sign == '+' else 'not in it'}")
        if sign == "+":
            parts[part] = option
        else:
            del parts[part]
    if len(bases := [part for part in _BASES if part in parts]) > 1:
        raise InputError(f"variant {name!r}: {' and '.join(bases)} are {len(bases)} base queries; name one")
    if "pairwise" in parts and (others := [part for part in ("kl", "gist", "sprc") if part in parts]):
        raise InputError(f"variant {name!r}: pairwise uses no in-batch negatives, which {others[0]} needs; name one of the two")
    if "pairwise" in parts and "trns" not in parts:
        raise InputError(f"variant {name!r}: pairwise needs mined negatives to rank the target over; add +trns, or QuRe's +trns:two-drops")
    return parts


def apply_variant(config: TrainConfig, parts: Variant, *, name: str) -> TrainConfig:
    """`config` with just these parts. Settings of a part that is off are set to their defaults, so that configurations
    which train alike are equal.

    pool: one nameless attention pool more in the base query; cls: the text's [CLS] as the base query; twopass: that of a
    second pass (SPRC). kl: the KL relevance loss, else InfoNCE; `kl:uniform` spreads its share evenly over the batch (label smoothing).
    law: attribute weights, with the attribute margin and presence losses; `law:unlabelled` without either, so that its losses read no
    label (a tower of `vision_weights` may have been trained on some); `law:constant` the same with weights that are equal for every text;
    `law:image` and `law:text` by what the weights see. trns: mined negatives with the ranking loss; its options are `ZONES`, and QuRe's two
    drops. pairwise: no in-batch loss, the ranking loss alone (QuRe), with random negatives during the warm-up. sprc: SPRC's auxiliary
    losses, or one of them; gist: GISTEmbed's filter of the in-batch negatives. Weights, margin and guide of these are the configuration's,
    and 1 where a weight is 0 there. Raises InputError
    where a part would change nothing, or cannot be; CheckpointError where `config.start` cannot be read.
    """
    if config.encoder_frozen and "law" not in parts:
        raise InputError(f"variant {name!r}: finetune=attributes trains only what +law adds; add +law")
    if config.start and (bases := [part for part in _BASES if part in parts]):
        raise InputError(f"variant {name!r}: the base query comes from start={config.start}; leave {bases[0]} out")
    if config.start and (law := parts.get("law")) in _NO_LABEL and read_start(config.start).config.model.attribute_weights:
        raise InputError(
            f"variant {name!r}: law:{law} must not have seen labels, but they may have trained the attribute weights of "
            f"{config.start}; train from scratch, or start from a model without attribute weights"
        )
    loss, trns = _losses(config, parts, name)
    try:
        return msgspec.structs.replace(config, model=_model(config, parts), loss=loss, trns=trns)
    except ValueError as problem:
        raise InputError(f"variant {name!r}: {problem}") from problem


def _model(config: TrainConfig, parts: Variant) -> ModelConfig:
    model = msgspec.structs.replace(config.model, attribute_weights="law" in parts)
    if not config.start:
        base = next((_BASES[part] for part in _BASES if part in parts), "mean")
        model = msgspec.structs.replace(model, base_query=base)
    if "law" not in parts:
        return msgspec.structs.replace(model, weights_from="text")
    seen = {"text": "text", "image": "text+image", "constant": "constant"}.get(parts["law"], model.weights_from)
    return msgspec.structs.replace(model, weights_from=seen)


def _losses(config: TrainConfig, parts: Variant, name: str) -> tuple[LossConfig, TRNSConfig]:
    loss, defaults = config.loss, LossConfig()
    if "kl" in parts:
        _refuse(loss.relevance_share == 0, name, "kl", "loss.relevance_share is 0")
        loss = msgspec.structs.replace(loss, objective="kl")
        if parts["kl"] == "uniform":
            loss = msgspec.structs.replace(loss, relevance_spread="uniform", relevance_temperature=defaults.relevance_temperature)
    else:
        kept = {key: getattr(defaults, key) for key in _OF_KL}
        loss = msgspec.structs.replace(loss, objective="pairwise" if "pairwise" in parts else "infonce", **kept)
    loss = _rivals(loss, parts)
    if parts.get("law", "unlabelled") in _NO_LABEL:
        loss = msgspec.structs.replace(loss, attribute_weight=0.0, presence_weight=0.0, attribute_margin=defaults.attribute_margin)
    if "trns" not in parts:
        kept = {key: getattr(defaults, key) for key in ("ranking", "rank_margin")}
        return msgspec.structs.replace(loss, rank_weight=0.0, **kept), TRNSConfig(enabled=False)
    _refuse(loss.rank_weight == 0, name, "trns", "loss.rank_weight is 0")
    trns = msgspec.structs.replace(config.trns, enabled=True)
    if "pairwise" in parts and trns.warmup_epochs:
        trns = msgspec.structs.replace(trns, warmup="random")
    if option := parts["trns"]:
        rule: Literal["zones", "two-drops"] = "two-drops" if option == "two-drops" else "zones"
        zones = msgspec.structs.replace(ZONES.get(option, TRNSConfig().zones), seed=config.trns.zones.seed)
        trns = msgspec.structs.replace(trns, rule=rule, zones=zones)
    return loss, trns


def _rivals(loss: LossConfig, parts: Variant) -> LossConfig:
    """`loss` with SPRC's losses and GISTEmbed's filter, or without."""
    weights = {"prompt_weight": "align", "align_weight": "prompt"}  # each with the option that leaves it out
    on = {key: (getattr(loss, key) or 1.0) if parts.get("sprc", other) != other else 0.0 for key, other in weights.items()}
    kept = {"filter": "off", "filter_margin": 0.0, "filter_guide": "own"}
    if "gist" in parts:
        own = "absolute" if loss.filter == "off" else loss.filter
        kept = {"filter": parts["gist"] or own, "filter_margin": loss.filter_margin, "filter_guide": loss.filter_guide}
    return msgspec.structs.replace(loss, **on, **kept)


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
        raise InputError(f"--sweep: {axes[0].partition('=')[0]} is given twice; name it once")
    return tuple(itertools.product(*lines))


def point_label(point: Point) -> str:
    """`lo=0.002 hi=0.02`: the last words of the keys, with their values."""
    pairs = (assignment.partition("=") for assignment in point)
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)
