"""Unit vectors to search: random, or in clusters as embeddings are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine.processors import available_cpus
from dqe_engine.zones.arrays import F32, I64

Kind = Literal["random", "clustered"]
Storage = Literal["float32", "float16"]

_CLUSTERS = 1000
_CHUNK_VALUES = 1 << 23
_BOUND_QUERIES, _BOUND_ITEMS = 64, 20_000


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """What decides the vectors; fewer items or queries of the same spec are a prefix of more."""

    kind: Kind
    items: int
    queries: int
    width: int = 256
    tokens: int = 1
    storage: Storage = "float32"
    seed: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.items, self.width) if self.tokens == 1 else (self.items, self.tokens, self.width)

    @property
    def item_bytes(self) -> int:
        return self.items * self.tokens * self.width * (4 if self.storage == "float32" else 2)


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    items: NDArray[Any]  # (N, D) or (N, M, D), unit rows
    queries: F32  # (Q, D), unit rows, each at a cosine of about 0.5 to its target
    targets: I64  # (Q,)


@lru_cache(maxsize=1)
def vectors(spec: VectorSpec) -> Vectors:
    """The last spec's vectors are kept: several cases search the same ones."""
    items = np.empty(spec.shape, spec.storage)
    rng = np.random.default_rng(spec.seed)
    centers = _unit(rng.standard_normal((_CLUSTERS, spec.width), np.float32)) if spec.kind == "clustered" else None
    step = max(1, _CHUNK_VALUES // (spec.tokens * spec.width))

    def fill(start: int) -> None:
        chunk = np.random.default_rng((spec.seed, start))
        rows = _unit(chunk.standard_normal((step, *spec.shape[1:]), np.float32))  # whole chunks: a prefix stays a prefix
        if centers is not None:
            near = centers[chunk.integers(0, _CLUSTERS, step)]
            rows = _unit(rows + near.reshape(step, *(1,) * (len(spec.shape) - 2), spec.width))
        items[start : start + step] = rows[: spec.items - start]

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(fill, range(0, spec.items, step)))
    targets = rng.integers(0, spec.items, spec.queries)
    tokens = items[targets].reshape(spec.queries, spec.tokens, spec.width)[:, 0].astype(np.float32)
    noise = _unit(rng.standard_normal((spec.queries, spec.width), np.float32))
    return Vectors(items, _unit(tokens + np.float32(3**0.5) * noise), targets)


def mid_bounds(data: Vectors, near: float = 0.002, mid: float = 0.01) -> tuple[float, float]:
    """Absolute bounds around the targets' scores: a share `near` of all Δ lies below them and `mid` between them."""
    items = data.items[:_BOUND_ITEMS].astype(np.float32, copy=False)
    queries, targets = data.queries[:_BOUND_QUERIES], data.targets[:_BOUND_QUERIES]
    wanted = data.items[targets].astype(np.float32, copy=False).reshape(len(queries), -1, items.shape[-1])
    anchors = np.einsum("bd,bmd->bm", queries, wanted).max(axis=1)
    scores = (queries @ items.reshape(-1, items.shape[-1]).T).reshape(len(queries), len(items), -1).max(axis=2)
    low, high = np.quantile(anchors[:, None] - scores, (near, near + mid))
    return float(low), float(high)


def _unit(rows: F32) -> F32:
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows
