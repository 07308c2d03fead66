"""Inputs of the kind that a graph will see: from an evaluation set where there is one, else random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, VISION_ENCODER, GraphSpec
from dqe_training.checkpoint import Checkpoint
from dqe_training.data.images import load_pixels, to_pixel_values
from dqe_training.data.triplets import TextBatcher
from dqe_training.encoding import encode_pixels
from dqe_training.evaluation.protocol import EvaluationSet, load_evaluation_set
from dqe_training.model import DQEModel

from .graphs import random_inputs

QUERIES, QUERIES_OF_LARGE = 16, 2
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
    """Inputs of `spec` for up to `QUERIES` queries; `QUERIES_OF_LARGE` for a large vision tower itself."""
    model = checkpoint.model
    count = QUERIES_OF_LARGE if is_large(spec, model) else QUERIES
    longest = model.config.qformer.max_text_length
    if data is None or not data.evaluation.records:
        vocab_size = model.embeddings.word_embeddings.num_embeddings
        return random_inputs(spec, model.sizes, vocab_size, batch=count, text_length=min(8, longest), seed=0)
    records = data.evaluation.records[:count]
    pixels = load_pixels(data.images, [r.reference for r in records], model.config.preprocessing)
    texts = TextBatcher(checkpoint.tokenizer, [r.text for r in records], max_length=longest)
    ids, mask = texts(torch.arange(len(records)))
    every = {
        "pixel_values": to_pixel_values(pixels, model.config.preprocessing),
        "image_tokens": encode_pixels(model, pixels).cpu(),
        "input_ids": ids,
        "attention_mask": mask,
    }
    if spec == ATTRIBUTE_HEADS:
        every |= model.fuse_query(every["image_tokens"], ids, mask)._asdict()
    return {tensor.name: every[tensor.name] for tensor in spec.inputs}
