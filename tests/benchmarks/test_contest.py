"""The contest of exact searches: a library that loses an answer, and lists that change one, end it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.harness import AnswerMismatchError, Rounds
from benchmarks.retrieval.contest import LISTS, SCREEN, Contest, all_contenders, compare, exact_contenders
from benchmarks.retrieval.contest_report import markdown
from benchmarks.retrieval.tokens import Tokens, grown, power_law, subspace
from dqe_engine.tuning import Built, Contender, LeftOutError, Setting
from dqe_engine.tuning.contenders import Found
from dqe_engine.zones import Screen
from dqe_engine.zones.arrays import F32, I64

pytest.importorskip("faiss", reason="faiss-cpu, of the extra bench")

QUICK = Contest(Rounds(minimum=2, maximum=2, seconds=0.0), blocks=1, asked=16, threads=(1,))


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return subspace(1200, 4, 16, 8)


def damaged(contender: Contender, name: str, change: float) -> Contender:
    """Its second best item is taken away, or its best score changed."""

    def build(items: F32) -> Built:
        built = contender.build(items)

        def search(queries: F32, references: I64, k: int) -> Found:
            scores, ids = (built.ladders(1) or [])[0][0].search(queries, references, k + 1)
            if not change:
                return np.delete(scores, 1, axis=1), np.delete(ids, 1, axis=1)
            scores[:, 0] += np.float32(change)
            return scores[:, :-1], ids[:, :-1]

        return Built(built.size, lambda threads: [[Setting({}, search, exact=True)]])

    return dataclasses.replace(contender, name=name, build=build)


def test_every_library_answers_and_is_timed(tokens: Tokens) -> None:
    rows = compare("tokens", tokens, all_contenders(), QUICK)
    done = {row["name"]: row for row in rows if row["status"] == "ok"}
    faiss = ("IndexFlatIP", "IndexFlatIPPanorama, PCA", "IVF-Flat", "IVF-Flat, 8 cells a root", "HNSW")
    assert {LISTS, SCREEN, *(f"FAISS {name}" for name in faiss)} <= set(done)
    assert all(row["recall"] == 1.0 for row in done.values() if row["exact"])
    assert all(row["median_s"] > 0 for row in done.values())
    section = {"galleries": [{"label": "tokens", "items": 1200, "tokens": 4, "width": 16, "encoded": 0, "rows": rows}], "by_threads": [1]}
    recorded = {"machine": {"cpu": "", "commit": "", "dirty": False, "versions": {}}, "load_before": [0.0], "load_after": [0.0]}
    recorded |= {"threads": 1, "started": "", "seconds": 0.0, "quick": True}
    text = markdown({"sections": {"growth": section | recorded | {"how": {}}, "data": section | recorded}})
    assert "| FAISS IndexFlatIPPanorama, PCA |" in text


@pytest.mark.parametrize(("name", "change", "said"), [("rival", 0.0, "is said to be exact"), (SCREEN, 1e-6, "other ids or scores")])
def test_a_wrong_answer_ends_the_contest(name: str, change: float, said: str, tokens: Tokens) -> None:
    ours = exact_contenders()
    with pytest.raises(AnswerMismatchError, match=said):
        compare("tokens", tokens, [ours[0], damaged(ours[1], name, change)], QUICK)


def test_the_screen_alone_has_neither_lists_nor_prefixes(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []

    def built(items: F32, *, threads: int, lists: bool, prefix: bool) -> Screen:
        asked.append((lists, prefix))
        return Screen(())

    monkeypatch.setattr(Screen, "build", built)
    for contender in exact_contenders()[:2]:
        contender.build(tokens.items)
    assert asked == [(True, True), (False, False)]


def test_what_only_building_shows_is_said(tokens: Tokens) -> None:
    def build(items: F32) -> Built:
        raise LeftOutError("left out: no luck")

    rows = compare("tokens", tokens, [exact_contenders()[0], Contender("rival", "", build)], QUICK)
    assert rows[1] == {"name": "rival", "status": "left out: no luck"}


def test_made_tokens_are_unit_vectors_of_the_shape_that_was_asked_for() -> None:
    for made, shape in ((power_law(300, 24, clusters=10), (300, 1, 24)), (subspace(50, 3, 12, 4), (50, 3, 12))):
        assert made.items.shape == shape
        np.testing.assert_allclose(np.linalg.norm(made.items, axis=2), 1, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(made.queries, axis=1), 1, atol=1e-5)
    flat = subspace(50, 3, 12, 4).items.reshape(-1, 12).astype(np.float64)
    spread = np.linalg.eigvalsh(flat.T @ flat)[::-1]
    assert spread[4:].sum() < 0.01 * spread.sum()
    some = subspace(60, 3, 12, 4).items
    np.testing.assert_array_equal(grown(some, 90)[:60], some)
    np.testing.assert_array_equal(grown(some, 90), grown(some, 90))
