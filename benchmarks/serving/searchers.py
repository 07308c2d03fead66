"""The ways to answer a query, one interface each: the engine, PyTorch as CIR repositories do it, and FAISS behind either."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.preprocessing import fit_image
from dqe_engine.query import Query

from .setting import Precision, Reference, Setting, engine, workload

if TYPE_CHECKING:  # a PyTorch server does not load it
    from dqe_engine.engine import RetrievalEngine

Ranking = list[tuple[str, float]]
"""One query's hits, best first: ids and scores."""
Encode = Callable[[Sequence[Reference], Sequence[str]], NDArray[np.float32]]
Device = Literal["cpu", "cuda"]
HNSW_NEIGHBOURS, HNSW_BUILD, HNSW_SEARCH = 32, 80, 128
FAISS_BLAS = 20
"""Queries from which on FAISS's flat search computes products by BLAS: its better setting (its default, 128,000, is in effect never)."""


class Searcher(Protocol):
    """`search`: the k best of each query, references by id (left out of their own ranking) or as a file's bytes."""

    timings_ms: dict[str, float]
    """By stage, of the last call; empty where they are not taken apart."""

    def search(self, references: Sequence[Reference], texts: Sequence[str], k: int) -> list[Ranking]: ...


def as_queries(references: Sequence[Reference], texts: Sequence[str], k: int = 10, *, zones: bool = False) -> list[Query]:
    return [
        Query(reference_id=reference, text=text, k=k, zones=zones)
        if isinstance(reference, str)
        else Query(image=reference, text=text, k=k, zones=zones)
        for reference, text in zip(references, texts, strict=True)
    ]


class EngineSearcher:
    """`RetrievalEngine.search_batch`. Threads may search at the same time, but for `timings_ms`."""

    def __init__(self, served: RetrievalEngine, *, zones: bool = False) -> None:
        self.served, self._zones = served, zones
        self.timings_ms: dict[str, float] = {}

    def search(self, references: Sequence[Reference], texts: Sequence[str], k: int) -> list[Ranking]:
        found = self.served.search_batch(as_queries(references, texts, k, zones=self._zones))
        self.timings_ms = found[0].timings_ms
        return [[(hit.id, hit.score) for hit in result.hits] for result in found]


class Clock:
    """Milliseconds by stage; `lap` ends one, once `synchronize` says that the device is idle."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self.timings_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        self._synchronize()
        now = time.perf_counter()
        self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now


@dataclass(frozen=True, slots=True)
class TorchFiles:
    """What a PyTorch server reads: paths, as text, so that they travel to a fresh process."""

    checkpoint: str
    targets: str
    images: str
    ids: str
    threads: int

    @classmethod
    def of(cls, setting: Setting) -> TorchFiles:
        paths = (setting.checkpoint, setting.targets_file, setting.images_file, setting.ids_file)
        checkpoint, targets, images, ids = (str(path.absolute()) for path in paths)
        return cls(checkpoint, targets, images, ids, setting.threads)


class TorchEncoder:
    """The checkpoint in PyTorch: decode, resize, tokenise, encode, compose, in inference mode.

    References by id take image tokens that were computed before, as the engine does. Cross-attention is the project's own, which is
    faster than upstream's; the tokenizer is `tokenizers` without a wrapper around it.
    """

    def __init__(self, files: TorchFiles, *, device: Device = "cpu", compiled: bool = False) -> None:
        import torch

        from dqe_training.checkpointing.checkpoint import load_checkpoint

        torch.set_num_threads(files.threads)
        loaded = load_checkpoint(Path(files.checkpoint))
        self._torch, self.device = torch, device
        self.model = loaded.model.to(device).eval()
        self._tokenizer = loaded.tokenizer
        self._tokenizer.enable_truncation(self.model.config.qformer.max_text_length)
        self._tokenizer.enable_padding(pad_id=loaded.meta.tokenizer.pad_id, pad_token=loaded.meta.tokenizer.pad_token)
        self._encode_images: Any = self.model.encode_images
        self._encode_query: Any = self.model.encode_query
        if compiled:
            self._encode_images = torch.compile(self._encode_images, dynamic=True)
            self._encode_query = torch.compile(self._encode_query, dynamic=True)
        self.ids: list[str] = json.loads(Path(files.ids).read_bytes())
        self._position = {id: at for at, id in enumerate(self.ids)}
        self._cached = torch.from_numpy(np.load(files.images)).to(device)  # (N, P, Hv) float16

    def encode(self, references: Sequence[Reference], texts: Sequence[str], clock: Clock) -> tuple[Any, list[int]]:
        """Composed queries (B, D) on the device, and each reference's position, -1 where it came as bytes."""
        from PIL import Image

        from dqe_training.data.images import to_pixel_values

        torch, spec = self._torch, self.model.config.preprocessing
        encodings = self._tokenizer.encode_batch(list(texts))
        ids, mask = (torch.tensor([getattr(e, name) for e in encodings], device=self.device) for name in ("ids", "attention_mask"))
        clock.lap("tokenise")
        rows = [self._position[reference] if isinstance(reference, str) else -1 for reference in references]
        images = [Image.open(io.BytesIO(reference)).convert("RGB") for reference in references if isinstance(reference, bytes)]
        known = [row for row in rows if row >= 0]
        tokens = self._cached[known].float() if known else None
        clock.lap("decode")
        if images:
            assert tokens is None, "a batch is of one kind of reference"
            pixels = to_pixel_values(np.stack([fit_image(image, spec) for image in images]), spec).to(self.device)
            clock.lap("preprocess")
            tokens = self._encode_images(pixels)
            clock.lap("vision")
        query = self._encode_query(tokens, ids, mask).query
        clock.lap("query")
        return query, rows


class TorchSearcher:
    """Scores of all items at once, the best token of each, and top-k: what public CIR code does at inference."""

    def __init__(
        self,
        files: TorchFiles,
        *,
        device: Device = "cpu",
        compiled: bool = False,
        gallery: tuple[list[str], NDArray[np.float32]] | None = None,
    ) -> None:
        """`gallery`: ids and target tokens (N, M, D) of another gallery than the files'."""
        import torch

        self._torch = torch
        self._encoder = TorchEncoder(files, device=device, compiled=compiled)
        self._ids, items = (self._encoder.ids, np.load(files.targets)) if gallery is None else gallery
        self._items = torch.from_numpy(items).to(device)
        self.timings_ms: dict[str, float] = {}

    def search(self, references: Sequence[Reference], texts: Sequence[str], k: int) -> list[Ranking]:
        from dqe_training.model.dqe import score

        clock = Clock(self._torch.cuda.synchronize) if self._encoder.device == "cuda" else Clock()
        with self._torch.inference_mode():
            queries, rows = self._encoder.encode(references, texts, clock)
            scores = score(queries, self._items)  # (B, N)
            for place, row in enumerate(rows):
                if row >= 0:
                    scores[place, row] = -np.inf
            best = scores.topk(min(k, len(self._ids)), dim=1)
            found = [
                [(self._ids[at], value) for at, value in zip(ats, values, strict=True)]
                for ats, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        clock.lap("search")
        self.timings_ms = clock.timings_ms
        return found


class FaissSearcher:
    """FAISS behind an encoder: over all M tokens of every item, or over one vector an item.

    Over tokens, the first (k + 1) M tokens hold at least k items besides the reference, each first met with its best token: MaxSim,
    and exact if the index is.
    """

    def __init__(self, setting: Setting, encode: Encode, vectors: NDArray[np.float32], *, tokens: int, hnsw: bool = False) -> None:
        import faiss

        faiss.omp_set_num_threads(setting.threads)
        faiss.cvar.distance_compute_blas_threshold = FAISS_BLAS
        self._encode, self._tokens, self._ids = encode, tokens, workload(setting).ids
        self._index: Any = faiss.IndexFlatIP(vectors.shape[1])
        if hnsw:
            self._index = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction, self._index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
        self._index.add(vectors)
        self.timings_ms: dict[str, float] = {}

    def search(self, references: Sequence[Reference], texts: Sequence[str], k: int) -> list[Ranking]:
        queries = self._encode(references, texts)
        depth = min((k + 1) * self._tokens, self._index.ntotal)
        scores, tokens = self._index.search(queries, depth)
        found = []
        for reference, values, ats in zip(references, scores.tolist(), tokens.tolist(), strict=True):
            best: dict[str, float] = {}
            for at, value in zip(ats, values, strict=True):
                if at >= 0 and (id := self._ids[at // self._tokens]) != reference and id not in best:
                    best[id] = value
                    if len(best) == k:
                        break
            found.append(list(best.items()))
        return found


def encode_by_engine(served: RetrievalEngine, references: Sequence[Reference], texts: Sequence[str]) -> NDArray[np.float32]:
    return served.encode_queries(as_queries(references, texts)).queries


def encode_by_torch(encoder: TorchEncoder, references: Sequence[Reference], texts: Sequence[str]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        queries: NDArray[np.float32] = encoder.encode(references, texts, Clock())[0].cpu().numpy()
    return queries


# One of each a process: the cases of a section share them.


@cache
def ours(setting: Setting, precision: Precision, device: Device = "cpu") -> EngineSearcher:
    return EngineSearcher(engine(setting, precision, device))


@cache
def pytorch(setting: Setting, device: Device = "cpu", compiled: bool = False) -> TorchSearcher:
    return TorchSearcher(TorchFiles.of(setting), device=device, compiled=compiled)


@cache
def faiss_tokens(setting: Setting, hnsw: bool) -> FaissSearcher:
    targets = np.load(setting.targets_file)  # (N, M, D)
    encode = partial(encode_by_engine, engine(setting, "f32"))
    return FaissSearcher(setting, encode, targets.reshape(-1, targets.shape[2]), tokens=targets.shape[1], hnsw=hnsw)


@cache
def faiss_one_vector(setting: Setting) -> FaissSearcher:
    pooled = np.load(setting.targets_file).mean(axis=1)  # (N, D)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    return FaissSearcher(setting, partial(encode_by_torch, TorchEncoder(TorchFiles.of(setting))), pooled, tokens=1)
