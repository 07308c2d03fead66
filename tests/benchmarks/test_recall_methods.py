"""The ways to search that the recall benchmark compares: FAISS's MaxSim against exact MaxSim, and the check that precedes timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.harness import AnswerMismatchError, Rounds, interleave
from benchmarks.retrieval import faiss_methods as by_faiss
from benchmarks.retrieval.cases import GalleryCase
from benchmarks.retrieval.galleries import Gallery, unit
from benchmarks.retrieval.methods import Method, Point, ours
from dqe_engine.tuning.contenders import Found, by_rows
from dqe_engine.zones.arrays import F32, I64

pytest.importorskip("faiss", reason="faiss-cpu, of the extra bench")

ITEMS, TOKENS, WIDTH, QUERIES = 300, 3, 16, 12


@pytest.fixture
def searched(rng: np.random.Generator) -> tuple[Gallery, F32, I64]:
    """A gallery, queries near some of its items, and the references that are left out."""
    gallery = Gallery(unit(rng.standard_normal((ITEMS, TOKENS, WIDTH)).astype(np.float32)))
    near = rng.integers(0, ITEMS, QUERIES)
    queries = unit(gallery.float32[near, 1] + 0.5 * unit(rng.standard_normal((QUERIES, WIDTH)).astype(np.float32)))
    return gallery, queries, near  # the best item of most queries is its reference, which must not come


def max_sim(gallery: Gallery, queries: F32, references: I64, k: int) -> I64:
    scores = np.einsum("bd,nmd->bnm", queries.astype(np.float64), gallery.float32.astype(np.float64)).max(axis=2)
    scores[np.arange(len(queries)), references] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


EXACT: dict[str, Callable[[int], Method]] = {
    "ours f32": lambda k: ours("ours f32", "float32"),
    "ours screened": lambda k: ours("ours screened", "float32", screened=True),
    "FAISS flat tokens": lambda k: by_faiss.flat("tokens", k),
    "FAISS HNSW over all, re-scored": lambda k: by_faiss.hnsw("tokens", 32, ((ITEMS * TOKENS, ITEMS * TOKENS),), rescored=True),
    "FAISS IVF over all cells, re-scored": lambda k: by_faiss.ivf_pq("tokens", 4, 4, ((ITEMS * TOKENS, 4),), rescored=True),
    "FAISS pooled, all re-scored": lambda k: by_faiss.flat("pooled", k, (ITEMS,), rescored=True),
}


@pytest.mark.parametrize("name", list(EXACT))
@pytest.mark.parametrize("k", [1, 10, ITEMS - 1, ITEMS + 5])
def test_max_sim_by_each_library_is_exact_where_it_looks_at_everything(name: str, k: int, searched: tuple[Gallery, F32, I64]) -> None:
    gallery, queries, references = searched
    (point,) = EXACT[name](k).build(gallery).points
    scores, found = point.search(queries, references, k)
    expected = max_sim(gallery, queries, references, k)[:, : ITEMS - 1]
    # Re-scoring reads float16 tokens, so neighbours may change places; the sets differ by next to nothing.
    kept = min(k, ITEMS - 1)
    same = np.mean([len(set(a[:kept].tolist()) & set(b[:kept].tolist())) / kept for a, b in zip(found, expected, strict=True)])
    assert same >= (0.9 if point.stored == "float16" else 1)
    if point.stored == "float32":
        np.testing.assert_array_equal(found[:, :kept], expected[:, :kept])
    assert (found[:, kept:] == -1).all()
    assert np.isneginf(scores[:, kept:]).all()
    assert (np.diff(scores[:, :kept], axis=1) <= 0).all()


def test_rows_are_grouped_by_item_and_ties_go_to_the_lower() -> None:
    def search_rows(queries: F32, fetch: int) -> Found:
        return np.array([[0.9, 0.9, 0.8, 0.8, 0.5, -np.inf]], np.float32), np.array([[7, 6, 2, 4, 3, -1]])

    search = by_rows(search_rows, 2, 6, None)  # rows 6 and 7 are item 3, 4 is 2, 2 and 3 are 1
    scores, found = search(np.ones((1, 4), np.float32), np.array([9]), 4)
    assert found.tolist() == [[3, 1, 2, -1]]
    np.testing.assert_array_equal(scores, np.array([[0.9, 0.8, 0.8, -np.inf]], np.float32))
    assert search(np.ones((1, 4), np.float32), np.array([3]), 2)[1].tolist() == [[1, 2]]


def test_too_few_rows_lose_items_and_enough_do_not(searched: tuple[Gallery, F32, I64]) -> None:
    gallery, queries, references = searched
    exact = max_sim(gallery, queries, references, 10)
    for fetch, complete in ((by_faiss.enough(gallery, "tokens", 10), True), (10, False)):
        (point,) = by_faiss.flat("tokens", 10, (fetch,)).build(gallery).points
        found = point.search(queries, references, 10)[1]
        assert np.array_equal(found, exact) == complete


def test_bytes_are_of_all_that_a_search_reads(searched: tuple[Gallery, F32, I64]) -> None:
    gallery = searched[0]
    values = ITEMS * TOKENS * WIDTH
    assert ours("f16", "float16").build(gallery).size == 2 * values
    assert by_faiss.flat("tokens", 10).build(gallery).size == pytest.approx(4 * values, abs=100)
    rescored = by_faiss.flat("pooled", 10, (20,), rescored=True).build(gallery).size
    assert rescored == pytest.approx(4 * ITEMS * WIDTH + 2 * values, abs=100)


def test_what_is_left_out_says_why(searched: tuple[Gallery, F32, I64]) -> None:
    gallery = searched[0]
    for most, said in ((ITEMS, "left out: building it over 900 rows takes minutes (--full)"), (ITEMS * TOKENS, None)):
        assert by_faiss.hnsw("tokens", 8, ((16, 16),), rescored=False, most_rows=most).obstacle(gallery) == said
    for code, lists, said in ((4, 4, None), (5, 4, "5 subvectors do not divide a width of 16"), (4, 1000, "fewer than 1,000 to train on")):
        found = by_faiss.ivf_pq("tokens", lists, code, ((9, 1),), rescored=False).obstacle(gallery)
        assert found is None if said is None else said in str(found)


# -- the check before the clock ----------------------------------------------------------------------------------------------


def case(searched: tuple[Gallery, F32, I64], point: Point) -> GalleryCase:
    return GalleryCase("case", *searched, {"searched": point}, batch=4, k=5)


def test_answers_that_are_right_are_timed(searched: tuple[Gallery, F32, I64]) -> None:
    (point,) = ours("ours", "float32").build(searched[0]).points
    (result,) = interleave(case(searched, point), Rounds(minimum=2, maximum=2))
    assert result.agreement is not None
    assert result.agreement.same_ids == 1
    assert result.agreement.max_error < 1e-6


def test_batches_go_through_the_queries(searched: tuple[Gallery, F32, I64]) -> None:
    seen = []

    def search(queries: F32, references: I64, k: int) -> Found:
        seen.append(references.tolist())
        return point.search(queries, references, k)

    (point,) = ours("ours", "float32").build(searched[0]).points
    interleave(case(searched, dataclasses.replace(point, search=search)), Rounds(minimum=2, maximum=2))
    references = searched[2].tolist()
    assert seen == [references[:4], references[4:8], references[8:], references[:4]]  # check, warm-up, two rounds


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda scores, found, references: (scores + 1e-4, found), "score error"),
        (lambda scores, found, references: (scores[:, ::-1], found[:, ::-1]), "score error"),
        (lambda scores, found, references: (scores, np.repeat(found[:, :1], 5, axis=1)), "twice"),
        (lambda scores, found, references: (scores, np.concatenate([references[:, None], found[:, 1:]], axis=1)), "the reference"),
        (lambda scores, found, references: (scores, np.where(np.arange(5) < 4, found, -1)), "4 items of 5"),
        (lambda scores, found, references: (scores, found + ITEMS), "outside"),
    ],
)
def test_a_spoilt_answer_is_never_timed(spoil: Callable[..., Found], said: str, searched: tuple[Gallery, F32, I64]) -> None:
    (point,) = ours("ours", "float32").build(searched[0]).points

    def search(queries: F32, references: I64, k: int) -> Found:
        return spoil(*point.search(queries, references, k), references)

    with pytest.raises(AnswerMismatchError, match=said):
        interleave(case(searched, dataclasses.replace(point, search=search)), Rounds(minimum=1, maximum=1))
