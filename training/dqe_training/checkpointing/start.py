"""The checkpoint that training starts with (`TrainConfig.start`): found, and held against the configuration. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from dqe_engine.contracts.parsing import parse_json
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import CheckpointError
from dqe_engine.files import describe_os_error, read_regular

from ..config.schema import ModelConfig, TrainConfig
from .meta import VOCABULARY, CheckpointMeta, parse_meta

_OF_THE_HEADS = frozenset({"attribute_weights", "weights_from", "qformer.dropout"})
"""What may be set over a checkpoint whose encoder stays what it is."""
_OF_ITS_USE = frozenset(
    {"qformer.pooled", "qformer.max_text_length", "learned_temperature"}
    | {f"preprocessing.{f}" for f in ("fit", "target_ratio", "resample", "background", "mean", "std", "max_pixels")}
)
"""What may be set, too, where the encoder trains on: it fixes neither a shape nor what a trained weight is for."""


def start_directory(start: str) -> Path:
    """The directory that `TrainConfig.start` names."""
    return Path(os.path.expanduser(start))


def read_start(start: str) -> CheckpointMeta:
    """What the checkpoint says of itself; nothing is verified yet (`load_start` does). Raises CheckpointError."""
    try:
        return parse_meta(start_directory(start))
    except CheckpointError as error:
        raise CheckpointError(f"start {error}") from error


def read_attributes(path: Path) -> AttributeVocabulary:
    """A checkpoint's vocabulary. Raises CheckpointError."""
    try:
        return parse_json(AttributeVocabulary, read_regular(path), where=str(path), error=CheckpointError)
    except OSError as error:
        raise CheckpointError(describe_os_error(error, path)) from error


def start_vocabulary(config: TrainConfig) -> Path | None:
    """The vocabulary of data that brings none: the start's, whose heads would else be thrown away. None without a start, and where it has
    no attributes and the training is to add some."""
    if not config.start:
        return None
    path = start_directory(config.start) / VOCABULARY
    if config.model.attribute_weights and not read_attributes(path).attributes:
        return None
    return path


def check_start(config: TrainConfig, made: ModelConfig) -> None:
    """Raise CheckpointError where `config.model` is not the model `made` whose weights `config.start` holds."""
    free = _OF_THE_HEADS if config.encoder_frozen else _OF_THE_HEADS | _OF_ITS_USE
    if made.base_query == "zero_shot" and not config.encoder_frozen:  # trained for no base query, so for any that needs no other weights
        free |= {"text_share"} if config.model.base_query in ("pool", "two_encoders") else {"text_share", "base_query"}
    if not made.qformer.position_embeddings:  # the position table is then as long as the longest text
        free -= {"qformer.max_text_length"}
    ours, theirs = _settings(config.model), _settings(made)
    for key in ours:
        if key not in free and ours[key] != theirs[key]:
            why = "finetune attributes keeps its encoder as it is" if config.encoder_frozen else "its weights are for that alone"
            raise CheckpointError(
                f"start {config.start}: trained with model.{key} {theirs[key]}, the configuration sets {ours[key]}, but {why}; leave it out"
            )


def _settings(model: ModelConfig) -> dict[str, Any]:
    """The values of a model's configuration by `section.key`."""
    settings: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(model).items():
        settings |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return settings
