"""A checkpoint or a bundle as the model that is evaluated: galleries of any size, one block of images in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dqe_engine.contracts.manifest import MANIFEST_FILE
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.index import ImageStorage
from dqe_engine.query import Query

from ..checkpointing.checkpoint import Checkpoint, load_checkpoint
from ..data.images import load_pixels
from ..data.queries import QuerySet
from ..data.triplets import TextBatcher
from ..encoding import ENCODE_BATCH, Listener, encode_pixels, evaluating
from ..features import image_token_blocks
from .probes.asking import Asking, Labels
from .protocol import Embeddings
from .pytorch import embed
from .runtime import search_queries

Advance = Callable[[str, int], None]
"""Told "gallery", "queries" or "probes", and how many more are done."""

_MEAN_OF = 256
"""How many images of a gallery the neutral image is the mean of, evenly spaced; more change it by less than a grey level."""


class Model(Protocol):
    """What is evaluated. `attributes`: names of the attributes that it weighs, none for a model without."""

    @property
    def attributes(self) -> tuple[str, ...]: ...

    @property
    def preprocessing(self) -> PreprocessingSpec: ...

    def __call__(self, queries: QuerySet, folder: Path, names: Sequence[str]) -> Embeddings:
        """Rank every query; see `benchmarks.Ranker`."""
        ...

    def encode(
        self, references: Sequence[str | None], texts: Sequence[str], files: dict[str, Path], neutral: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """Composed queries (N, D) of pairs: a reference, by its id in `files`, and a text. None: the image `neutral` (H, W, 3)."""
        ...


def open_ranker(
    path: Path,
    advance: Advance = lambda what, n: None,
    *,
    features: Path | None = None,
    listener: Listener = lambda event: None,
    image_storage: ImageStorage = "none",
) -> Model:
    """The model at `path`: a bundle where it has a manifest, else a checkpoint, which may take image tokens from the cache
    `features`. `image_storage`: a bundle's. Raises BundleError or CheckpointError."""
    if (path / MANIFEST_FILE).is_file():
        return EngineRanker(RetrievalEngine.load(path), advance, image_storage=image_storage)
    return CheckpointRanker(load_checkpoint(path), advance, features=features, listener=listener)


class CheckpointRanker:
    """Ranks in PyTorch, on a CUDA device where there is one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        advance: Advance = lambda what, n: None,
        *,
        features: Path | None = None,
        listener: Listener = lambda event: None,
    ) -> None:
        self._model = checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer, self._advance, self._features, self._listener = checkpoint.tokenizer, advance, features, listener
        self.attributes = self._model.vocabulary.names if self._model.config.attribute_weights else ()
        self.preprocessing = self._model.config.preprocessing

    def __call__(self, queries: QuerySet, folder: Path, names: Sequence[str]) -> Embeddings:
        blocks = image_token_blocks(
            self._model, folder, names, features=self._features, listener=self._listener, advance=lambda n: self._advance("gallery", n)
        )
        return embed(self._model, self._tokenizer, queries, blocks, advance=lambda n: self._advance("queries", n))

    def encode(
        self, references: Sequence[str | None], texts: Sequence[str], files: dict[str, Path], neutral: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """References are decoded and encoded again, a block at a time: once a block, so those of one reference should stand together."""
        batcher = TextBatcher(
            self._tokenizer, texts, max_length=self._model.config.qformer.max_text_length, captions=self._model.config.captions
        )
        out = np.empty((len(texts), self._model.sizes.embedding_dim), np.float32)
        device = self._model.query_tokens.device
        with evaluating(self._model):
            for rows in torch.arange(len(texts)).split(ENCODE_BATCH):
                part = [references[row] for row in rows]
                names = list(dict.fromkeys(name for name in part if name is not None))
                pixels = load_pixels(Path(), [str(files[name]) for name in names], self.preprocessing)
                tokens = encode_pixels(self._model, np.concatenate([pixels, neutral[None]]) if None in part else pixels)
                at = {name: row for row, name in enumerate([*names, None])}
                ids, mask = (t.to(device) for t in batcher(rows))
                out[rows] = self._model.encode_query(tokens[[at[name] for name in part]], ids, mask).query.float().cpu().numpy()
                self._advance("probes", len(rows))
        return out


class EngineRanker:
    """Ranks with the runtime. With `image_storage` "none" the index keeps no image tokens, and references are encoded again."""

    def __init__(self, engine: RetrievalEngine, advance: Advance = lambda what, n: None, *, image_storage: ImageStorage = "none") -> None:
        self._engine, self._advance, self._storage = engine, advance, image_storage
        self.attributes = engine.bundle.vocabulary.names
        self.preprocessing = engine.bundle.manifest.preprocessing

    def __call__(self, queries: QuerySet, folder: Path, names: Sequence[str]) -> Embeddings:
        files = {id: folder / name for id, name in zip(queries.gallery, names, strict=True)}
        self._engine.new_index(image_storage=self._storage)
        shown = 0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            self._advance("gallery", done - shown)
            shown = done

        self._engine.index_images(files, progress=progress)
        kept = None if self._storage != "none" else files
        return search_queries(self._engine, queries, files=kept, advance=lambda n: self._advance("queries", n))

    def encode(
        self, references: Sequence[str | None], texts: Sequence[str], files: dict[str, Path], neutral: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """From the index's image tokens where it keeps any, else decoded and encoded again."""
        out = []
        for start in range(0, len(texts), ENCODE_BATCH):
            pairs = zip(references[start : start + ENCODE_BATCH], texts[start : start + ENCODE_BATCH], strict=True)
            part = [
                Query(text=text, image=Image.fromarray(neutral))
                if name is None
                else Query(text=text, reference_id=name)
                if self._storage != "none"
                else Query(text=text, image=files[name])
                for name, text in pairs
            ]
            out.append(self._engine.encode_queries(part).queries)
            self._advance("probes", len(part))
        return np.concatenate(out)


def ask(model: Model, queries: QuerySet, folder: Path, names: Sequence[str], found: Embeddings, labels: Labels | None = None) -> Asking:
    """What probes ask the model that has ranked `queries`, of a gallery that lies under `folder` as `names`."""
    files = {id: folder / name for id, name in zip(queries.gallery, names, strict=True)}
    shown = names[:: -(-len(names) // _MEAN_OF)]
    neutral = load_pixels(folder, shown, model.preprocessing).mean(axis=0).round().astype(np.uint8)

    def encode(references: Sequence[str | None], texts: Sequence[str]) -> NDArray[np.float32]:
        return model.encode(references, texts, files, neutral)

    return Asking(queries, found, encode, f"the mean of {len(shown)} images of the gallery, pixel by pixel", labels)
