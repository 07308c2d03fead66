"""Evaluation of a checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from dqe_engine.zones import select_zones

from ..data.images import load_pixels
from ..data.triplets import TextBatcher
from ..encoding import Listener, TokenTable, encode_image_tokens
from ..features import cached_tokens
from ..model import DQEModel
from .protocol import DEPTH, Embeddings, EvaluationSet, Report, summarise


def encode_gallery_images(
    model: DQEModel,
    images: Path,
    evaluation: EvaluationSet,
    *,
    features: Path | None = None,
    listener: Listener = lambda event: None,
    advance: Callable[[int], None] = lambda n: None,
) -> TokenTable:
    """Image tokens (G, P, Hv) float32 of the gallery from the image folder, or float16 ones from the cache `features`.

    `listener` hears what a cache has to say (`features.fill`).
    """
    if features is not None:
        tokens = cached_tokens(features, model, images, evaluation.gallery, listener=listener)
        advance(len(tokens))
        return tokens
    pixels = load_pixels(images, evaluation.gallery, model.config.preprocessing, advance=advance)
    return encode_image_tokens(model, pixels, dtype=torch.float32)


@torch.inference_mode()
def evaluate_model(
    model: DQEModel, tokenizer: Tokenizer, evaluation: EvaluationSet, image_tokens: TokenTable, *, batch_size: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Report, Embeddings]:  # fmt: skip
    """Encode gallery and queries, rank exactly, summarise. `image_tokens` (G, P, Hv) of the gallery, any float dtype."""
    device = model.query_tokens.device
    model.eval()
    parts = torch.arange(len(image_tokens)).split(batch_size)
    targets = torch.cat([model.encode_targets(image_tokens[rows].to(device).float()).cpu() for rows in parts])
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
