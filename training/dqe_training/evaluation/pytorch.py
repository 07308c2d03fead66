"""Evaluation of a checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dqe_engine.zones import select_zones

from ..data.images import load_pixels
from ..data.queries import QuerySet
from ..data.triplets import TextBatcher
from ..encoding import Listener, TokenTable, encode_image_tokens
from ..features import cached_tokens
from ..model import DQEModel
from .protocol import Embeddings, EvaluationSet, Report, summarise


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
def embed(
    model: DQEModel, tokenizer: Tokenizer, queries: QuerySet, blocks: Iterable[Tensor], *, batch_size: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> Embeddings:  # fmt: skip
    """Encode gallery and queries and rank exactly. `blocks`: the gallery's image tokens in order, of any float dtype.

    A query is encoded while its reference's tokens are at hand, so no more than a block of them is in memory.
    """
    device, sizes = model.query_tokens.device, model.sizes
    model.eval()
    texts = TextBatcher(tokenizer, queries.texts, max_length=model.config.qformer.max_text_length, captions=model.config.captions)
    embedded = np.zeros((len(queries), sizes.embedding_dim), np.float32)
    weights = np.zeros((len(queries), sizes.attributes), np.float32)
    targets = np.empty((len(queries.gallery), sizes.target_tokens, sizes.embedding_dim), np.float32)
    start = 0
    for block in blocks:
        tokens = block.to(device).float()
        targets[start : start + len(tokens)] = model.encode_targets(tokens).cpu().numpy()
        (rows,) = np.nonzero((queries.reference >= start) & (queries.reference < start + len(tokens)))
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            ids, mask = (t.to(device) for t in texts(torch.from_numpy(part)))
            references = torch.from_numpy(queries.reference[part] - start).to(device)
            output = model.encode_query(tokens[references], ids, mask)
            embedded[part] = output.query.cpu().numpy()
            weights[part] = output.attribute_weights.cpu().numpy()
            advance(len(part))
        start += len(tokens)
    found = select_zones(embedded, targets, k=queries.depth, exclude=queries.excluded)
    return Embeddings(embedded, targets, weights, found.ids, found.scores)


def evaluate_model(
    model: DQEModel, tokenizer: Tokenizer, evaluation: EvaluationSet, image_tokens: TokenTable, *, batch_size: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Report, Embeddings]:  # fmt: skip
    """Encode gallery and queries, rank exactly, summarise. `image_tokens` (G, P, Hv) of the gallery, any float dtype."""
    blocks = (image_tokens[rows] for rows in torch.arange(len(image_tokens)).split(batch_size))
    found = embed(model, tokenizer, evaluation.queries, blocks, batch_size=batch_size, advance=advance)
    weights = found.weights if model.config.attribute_weights else None
    return summarise(evaluation, found.ranked, weights=weights, attributes=model.vocabulary.names), found
