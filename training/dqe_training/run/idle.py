"""Parts of a training that would do nothing: each is said at the start, and an error with `--strict`."""

from __future__ import annotations

from ..config import TrainConfig
from ..data.label_coverage import LabelCoverage


def idle_parts(config: TrainConfig, coverage: LabelCoverage) -> list[str]:
    """One sentence, with the remedy, for each part that the configuration turns on and that cannot act on data of this `coverage`."""
    found = (_trns(config), _relevance(config), _margin(config, coverage), _presence(config, coverage))
    return [sentence for sentence in found if sentence]


def margin_acts(config: TrainConfig, coverage: LabelCoverage) -> bool:
    """Whether the attribute margin is turned on and has labels to act on."""
    return config.model.attribute_weights and config.loss.attribute_weight > 0 and coverage.margin_active


def _trns(config: TrainConfig) -> str:
    trns, optim = config.trns, config.optim
    if not trns.enabled:
        return ""
    if config.loss.rank_weight == 0:
        return "TRNS mines negatives that no loss reads, since loss.rank_weight is 0; raise it, or set trns.enabled=false"
    if not optim.seconds and not optim.steps and trns.warmup_epochs >= optim.epochs:
        return (
            f"TRNS never mines, since trns.warmup_epochs is {trns.warmup_epochs} of {optim.epochs} optim.epochs; "
            "lower it, train for longer, or set trns.enabled=false"
        )
    return ""


def _margin(config: TrainConfig, coverage: LabelCoverage) -> str:
    if not config.model.attribute_weights or config.loss.attribute_weight == 0 or coverage.margin_active:
        return ""
    return f"{coverage.message()}; or set loss.attribute_weight=0"


def _presence(config: TrainConfig, coverage: LabelCoverage) -> str:
    if not config.model.attribute_weights or config.model.weights_from == "constant":
        return ""
    if config.loss.presence_weight == 0:
        return (
            "nothing teaches the attribute weights which attributes a text names, since loss.presence_weight is 0; raise it, or set "
            "model.attribute_weights=false"
        )
    if not coverage.presence_active:
        return (
            "presence has nothing to learn from: no text names an attribute; give the vocabulary the texts' words, or set "
            "model.attribute_weights=false"
        )
    return ""


def _relevance(config: TrainConfig) -> str:
    loss = config.loss
    if loss.objective == "kl" and loss.relevance_share > 0 and loss.relevance_warmup >= 1:
        return (
            f"the KL loss stays InfoNCE, since loss.relevance_warmup is {loss.relevance_warmup:g} of the training; "
            "lower it, or set loss.objective=infonce"
        )
    return ""
