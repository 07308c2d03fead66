"""What makes an encoder the one that attribute heads were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from dqe_engine.contracts.parsing import to_json
from dqe_engine.files import sha256_of
from dqe_training.checkpointing.checkpoint import Checkpoint
from dqe_training.checkpointing.encoder_hash import encoder_hash

_LATER: Mapping[str, Mapping[str, object]] = {"vision": {"pre_norm": False, "final_norm_eps": 0.0}, "": {"captions": "plain"}}
"""Settings that came later, by section, and what they are in every model from before: left out there, they change no identity."""


def _as_before(model: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration without the settings of `_LATER` that it does not use."""
    for section, settings in _LATER.items():
        found = model[section] if section else model
        for key, value in settings.items():
            if found[key] == value:
                del found[key]
    return model


def encoder_identity(checkpoint: Checkpoint) -> str:
    """SHA-256 of all that decides what heads get to see: weights but their own, architecture, preprocessing and tokenizer.

    Whether the model uses its heads, and what it drops in training, does not.
    """
    config = checkpoint.meta.config.model
    config = msgspec.structs.replace(config, attribute_weights=True, qformer=msgspec.structs.replace(config.qformer, dropout=0.0))
    described = _as_before(msgspec.to_builtins(config))
    if config.base_query != "zero_shot":  # nothing reads it, and bundles of earlier versions had no such setting
        del described["text_share"]
    tokenizer = sha256_of(checkpoint.directory / checkpoint.meta.tokenizer.file)
    return hashlib.sha256(to_json((encoder_hash(checkpoint), described, checkpoint.meta.tokenizer, tokenizer))).hexdigest()
