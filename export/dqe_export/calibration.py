"""Inputs of the kind that a graph will see: from an evaluation set where there is one, else random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import Precision
from dqe_engine.errors import InputError
from dqe_training.checkpointing.checkpoint import Checkpoint
from dqe_training.data.images import load_pixels, to_pixel_values
from dqe_training.data.records import TripletRecord
from dqe_training.data.triplets import TextBatcher
from dqe_training.encoding import encode_image_tokens
from dqe_training.evaluation.protocol import EvaluationSet, load_evaluation_set
from dqe_training.model import DQEModel

from .batch_dependence import MakeInputs
from .graphs import random_inputs

QUERIES, QUERIES_OF_LARGE = 32, 2
_LARGE = 200_000_000
"""Parameters of a vision tower, from which on a sweep of its layers takes the fewer queries."""


@dataclass(frozen=True)
class EvaluationData:
    """A dataset folder, to judge an export by."""

    directory: Path
    evaluation: EvaluationSet

    @classmethod
    def open(cls, directory: Path) -> EvaluationData:
        """Raises InputError for a folder that is not as `dqe-data garments` writes it."""
        return cls(directory, load_evaluation_set(directory))

    @property
    def images(self) -> Path:
        return self.directory / "images"

    @property
    def name(self) -> str:
        return self.directory.name


def is_large(spec: GraphSpec, model: DQEModel) -> bool:
    """Whether `spec` is a vision tower of which one forward pass takes seconds on a CPU."""
    return spec == VISION_ENCODER and sum(parameter.numel() for parameter in model.vision_model.parameters()) >= _LARGE


@torch.inference_mode()
def calibration_inputs(spec: GraphSpec, checkpoint: Checkpoint, data: EvaluationData | None) -> dict[str, Tensor]:
    """What layers are judged by: inputs of `spec` for up to `QUERIES` queries; `QUERIES_OF_LARGE` for a large vision tower itself."""
    model = checkpoint.model
    count = QUERIES_OF_LARGE if is_large(spec, model) else QUERIES
    if data is None or not data.evaluation.records:
        longest, vocab_size = model.config.qformer.max_text_length, model.embeddings.word_embeddings.num_embeddings
        return random_inputs(spec, model.sizes, vocab_size, batch=count, text_length=min(8, longest), seed=0)
    return _inputs_of(spec, checkpoint, data, data.evaluation.records[:count])


@torch.inference_mode()
def scale_inputs(spec: GraphSpec, checkpoint: Checkpoint, data: EvaluationData) -> dict[str, Tensor]:
    """What fixed scales are read off: inputs of `spec` for up to `QUERIES` queries, at most half of those there are."""
    return _inputs_of(spec, checkpoint, data, data.evaluation.records[: _scaled_by(data)])


def _scaled_by(data: EvaluationData) -> int:
    count = len(data.evaluation.records)
    if count < 2:
        raise InputError(
            f"{data.directory}: int8-static needs two queries, some to read scales off and others to judge them; it has {count}"
        )
    return min(QUERIES, count // 2)


def parity_inputs(spec: GraphSpec, checkpoint: Checkpoint, data: EvaluationData | None, precision: Precision) -> MakeInputs | None:
    """What `spec` is held against PyTorch on: random inputs (None), which ask for more than real ones do. But scales that were read off
    real queries fit no others, and are judged by queries that they were not read off."""
    return partial(real_inputs, spec, checkpoint, data) if precision == "int8-static" and data is not None else None


@torch.inference_mode()
def real_inputs(
    spec: GraphSpec, checkpoint: Checkpoint, data: EvaluationData, *, batch: int, text_length: int, seed: int
) -> dict[str, Tensor]:
    """Inputs of one shape from queries that no scale was read off: texts are cut or padded. Raises InputError where there are none."""
    records = data.evaluation.records[_scaled_by(data) :]
    chosen = np.random.default_rng(seed).integers(0, len(records), batch)
    return _inputs_of(spec, checkpoint, data, [records[row] for row in chosen], text_length=text_length)


def _inputs_of(
    spec: GraphSpec, checkpoint: Checkpoint, data: EvaluationData, records: Sequence[TripletRecord], *, text_length: int | None = None
) -> dict[str, Tensor]:
    model = checkpoint.model
    pixels = load_pixels(data.images, [r.reference for r in records], model.config.preprocessing)
    texts = TextBatcher(
        checkpoint.tokenizer, [r.text for r in records], max_length=model.config.qformer.max_text_length, captions=model.config.captions
    )
    ids, mask = texts(torch.arange(len(records)))
    if text_length is not None:
        ids, mask = (F.pad(tokens, (0, max(0, text_length - tokens.shape[1])))[:, :text_length] for tokens in (ids, mask))
    every = {"pixel_values": to_pixel_values(pixels, model.config.preprocessing), "input_ids": ids, "attention_mask": mask}
    if spec != VISION_ENCODER:
        every["image_tokens"] = encode_image_tokens(model, pixels, dtype=torch.float32)
    if spec == ATTRIBUTE_HEADS:
        every |= model.fuse_query(every["image_tokens"], ids, mask)._asdict()
    return {tensor.name: every[tensor.name] for tensor in spec.inputs}
