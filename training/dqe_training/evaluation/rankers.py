"""A checkpoint or a bundle as the model of a benchmark: galleries of any size, one block of images in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dqe_engine.contracts.manifest import MANIFEST_FILE
from dqe_engine.engine import RetrievalEngine

from ..checkpoint import Checkpoint, load_checkpoint
from ..data.queries import QuerySet
from ..encoding import Listener
from ..features import image_token_blocks
from .benchmarks import Ranker
from .protocol import Embeddings
from .pytorch import embed
from .runtime import search_queries

Advance = Callable[[str, int], None]
"""Told "gallery" or "queries", and how many more are done."""


def open_ranker(
    path: Path,
    advance: Advance = lambda what, n: None,
    *,
    features: Path | None = None,
    listener: Listener = lambda event: None,
) -> Ranker:
    """The model at `path`: a bundle where it has a manifest, else a checkpoint, which may take image tokens from the cache
    `features`. Raises BundleError or CheckpointError."""
    if (path / MANIFEST_FILE).is_file():
        return engine_ranker(RetrievalEngine.load(path), advance)
    return checkpoint_ranker(load_checkpoint(path), advance, features=features, listener=listener)


def checkpoint_ranker(
    checkpoint: Checkpoint,
    advance: Advance = lambda what, n: None,
    *,
    features: Path | None = None,
    listener: Listener = lambda event: None,
) -> Ranker:
    """Ranks in PyTorch, on a CUDA device where there is one."""
    model = checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def rank(queries: QuerySet, folder: Path, names: Sequence[str]) -> Embeddings:
        blocks = image_token_blocks(model, folder, names, features=features, listener=listener, advance=lambda n: advance("gallery", n))
        return embed(model, checkpoint.tokenizer, queries, blocks, advance=lambda n: advance("queries", n))

    return rank


def engine_ranker(engine: RetrievalEngine, advance: Advance = lambda what, n: None) -> Ranker:
    """Ranks with the runtime. The index keeps no image tokens, so a reference is encoded again for its queries."""

    def rank(queries: QuerySet, folder: Path, names: Sequence[str]) -> Embeddings:
        files = {id: folder / name for id, name in zip(queries.gallery, names, strict=True)}
        engine.new_index(image_storage="none")
        shown = 0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            advance("gallery", done - shown)
            shown = done

        engine.index_images(files, progress=progress)
        return search_queries(engine, queries, files=files, advance=lambda n: advance("queries", n))

    return rank
