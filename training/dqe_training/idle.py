"""Parts of a training that would do nothing: each is said at the start, and an error with `--strict`."""

from __future__ import annotations

from dqe_engine.contracts.vocabulary import AttributeVocabulary

from .config import TrainConfig
from .data.label_coverage import label_coverage
from .data.triplets import TripletData


def idle_parts(config: TrainConfig, data: TripletData, vocabulary: AttributeVocabulary) -> list[str]:
    """One sentence, with the remedy, for each part that the configuration turns on and that cannot act on this data."""
    return [sentence for sentence in (_trns(config), _relevance(config), _margin(config, data, vocabulary)) if sentence]


def _trns(config: TrainConfig) -> str:
    trns, optim = config.trns, config.optim
    if not trns.enabled:
        return ""
    if config.loss.rank_weight == 0:
        return "TRNS mines negatives that no loss reads, since loss.rank_weight is 0; raise it, or set trns.enabled=false"
    if optim.seconds == 0 and trns.warmup_epochs >= optim.epochs:
        return (
            f"TRNS never mines, since trns.warmup_epochs is {trns.warmup_epochs} of {optim.epochs} optim.epochs; "
            "lower it, train for longer, or set trns.enabled=false"
        )
    return ""


def _margin(config: TrainConfig, data: TripletData, vocabulary: AttributeVocabulary) -> str:
    if not config.model.attribute_weights or config.loss.attribute_weight == 0:
        return ""
    coverage = label_coverage(data, vocabulary, batch=config.optim.batch_size)
    return "" if coverage.margin_active else f"{coverage.message()}; or set loss.attribute_weight=0"


def _relevance(config: TrainConfig) -> str:
    loss = config.loss
    if loss.objective == "kl" and loss.relevance_share > 0 and loss.relevance_warmup >= 1:
        return (
            f"the KL loss stays InfoNCE, since loss.relevance_warmup is {loss.relevance_warmup:g} of the training; "
            "lower it, or set loss.objective=infonce"
        )
    return ""
