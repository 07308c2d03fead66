"""Evaluation of a checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from dqe_engine.zones import select_zones
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ..data.triplets import TextBatcher
from ..model import DQEModel
from .protocol import DEPTH, EvaluationSet, Report, summarise


@dataclass(frozen=True)
class Embeddings:
    """What an evaluation computed: queries (Q, D), target tokens (G, M, D), weights (Q, A), rankings (Q, <= 50)."""

    queries: NDArray[np.float32]
    target_tokens: NDArray[np.float32]
    weights: NDArray[np.float32]
    ranked: NDArray[np.int64]
    scores: NDArray[np.float32]


@torch.inference_mode()
def evaluate_model(
    model: DQEModel, tokenizer: Tokenizer, evaluation: EvaluationSet, image_tokens: Tensor, *, batch_size: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Report, Embeddings]:  # fmt: skip
    """Encode gallery and queries, rank exactly, summarise. `image_tokens` (G, P, Hv) of the gallery, any float dtype."""
    device = model.query_tokens.device
    model.eval()
    targets = torch.cat([model.encode_targets(part.to(device).float()).cpu() for part in image_tokens.split(batch_size)])
    texts = TextBatcher(tokenizer, [r.text for r in evaluation.records], max_length=model.config.qformer.max_text_length)
    queries, weights = [], []
    for rows in torch.arange(len(evaluation.records)).split(batch_size):
        ids, mask = texts(rows)
        tokens = image_tokens[torch.from_numpy(evaluation.reference)[rows]]
        output = model.encode_query(tokens.to(device).float(), ids.to(device), mask.to(device))
        queries.append(output.query.cpu())
        weights.append(output.attribute_weights.cpu())
        advance(len(rows))
    embedded = torch.cat(queries).numpy()
    found = select_zones(embedded, targets.numpy(), k=DEPTH, exclude=[[r] for r in evaluation.reference.tolist()])
    predicted = torch.cat(weights).numpy()
    report = summarise(
        evaluation, found.ids, weights=predicted if model.config.attribute_weights else None, attributes=model.vocabulary.names
    )
    return report, Embeddings(embedded, targets.numpy(), predicted, found.ids, found.scores)
