"""What makes an encoder the one that attribute heads were trained on."""

from __future__ import annotations

import hashlib

import msgspec

from dqe_engine.contracts.parsing import to_json
from dqe_engine.files import sha256_of
from dqe_training.checkpoint import Checkpoint
from dqe_training.encoder_hash import encoder_hash


def encoder_identity(checkpoint: Checkpoint) -> str:
    """SHA-256 of all that decides what heads get to see: weights but their own, architecture, preprocessing and tokenizer.

    Whether the model uses its heads, and what it drops in training, does not.
    """
    model = checkpoint.meta.config.model
    model = msgspec.structs.replace(model, attribute_weights=True, qformer=msgspec.structs.replace(model.qformer, dropout=0.0))
    described = msgspec.to_builtins(model)
    if model.base_query != "zero_shot":  # nothing reads it, and bundles of earlier versions had no such setting
        del described["text_share"]
    tokenizer = sha256_of(checkpoint.directory / checkpoint.meta.tokenizer.file)
    return hashlib.sha256(to_json((encoder_hash(checkpoint), described, checkpoint.meta.tokenizer, tokenizer))).hexdigest()
