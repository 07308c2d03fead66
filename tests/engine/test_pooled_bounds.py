"""The bound that certifies answers is above every score, with all rounding, and whoever breaks it is found out."""

from __future__ import annotations

import numpy as np
import pytest
from support.samples import unit

from dqe_engine.index.pooled_bounds import believable, bound_vectors, extended_queries
from dqe_engine.zones import select_zones

SHAPES = [(1, 1), (1, 64), (2, 4), (8, 64), (3, 257), (32, 256)]


def products_of(queries: np.ndarray, vectors: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(B, n) float32 sums in some order, one product after the other: as badly as a database could."""
    total = np.zeros((len(queries), len(vectors)), np.float32)
    for at in order:
        total += queries[:, at, None] * vectors[:, at][None]
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_no_score_is_above_its_bound(tokens: int, width: int, dtype: type, rng: np.random.Generator) -> None:
    """Also of items that sit on it: tokens in the query's own direction from the centre, tokens that are all equal, and any length."""
    queries = unit(rng.standard_normal((6, width)))
    queries[4] *= np.float32(1000)
    queries[5] *= np.float32(1e-5)
    random = unit(rng.standard_normal((40, tokens, width)))
    close = random[:, :1] + 1e-3 * random
    along = np.broadcast_to(queries[rng.integers(0, 6, 40)][:, None], random.shape) * rng.uniform(-1, 1, (40, tokens, 1))
    items = np.concatenate([random, close, along, np.zeros_like(random[:2]), 50 * random[:5], 1e-3 * random[:5]]).astype(dtype)
    scores = np.full((6, len(items)), np.nan, np.float32)
    found = select_zones(queries, items, k=len(items))
    np.put_along_axis(scores, found.ids, found.scores, axis=1)
    vectors, extended = bound_vectors(items), extended_queries(queries)
    assert vectors.shape == (len(items), width + 1)
    for _ in range(3):
        order = rng.permutation(width + 1)
        bounds = products_of(extended, vectors, order)
        assert (bounds >= scores).all()
        assert all(believable(row.astype(np.float64), query, vectors) for row, query in zip(bounds, extended, strict=True))
    assert (extended @ vectors.T >= scores).all()
    if tokens == 1:  # and it is tight: one token is its own centre
        assert (bounds - scores <= 1e-4 * np.linalg.norm(extended, axis=1)[:, None] * np.maximum(np.linalg.norm(vectors, axis=1), 1)).all()


def test_a_database_that_rounds_more_than_float32_is_found_out(rng: np.random.Generator) -> None:
    items, queries = unit(rng.standard_normal((50, 4, 64))), extended_queries(unit(rng.standard_normal((1, 64))))
    vectors = bound_vectors(items)
    exact = (vectors.astype(np.float64) @ queries[0].astype(np.float64)).astype(np.float64)
    assert believable(exact, queries[0], vectors)
    assert not believable(vectors.astype(np.float16).astype(np.float64) @ queries[0].astype(np.float64), queries[0], vectors)
    exact[7] += 1e-4
    assert not believable(exact, queries[0], vectors)
    assert not believable(np.full(50, np.nan), queries[0], vectors)
