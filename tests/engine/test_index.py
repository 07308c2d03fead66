"""The index in memory: adding, removing, exact search against a brute-force ranking, filters and zones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rankings import assert_ranked, ranking
from support.samples import image_rows, query_rows, target_rows

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.index import GalleryIndex, IndexMatches

MakeIndex = Callable[..., GalleryIndex]


@pytest.mark.parametrize("storage", ["f32", "f16"])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (19, 5), (111, 111), (19, 1000)])
def test_search_is_exact(make_index: MakeIndex, storage: str, rows: int, k: int) -> None:
    index = make_index(rows, storage=storage)
    stored = {f"i{n}": row.astype(np.float16 if storage == "f16" else np.float32) for n, row in enumerate(target_rows(rows))}
    queries = query_rows(3)
    for query, found in zip(queries, index.search(queries, k), strict=True):
        assert_ranked(found, ranking(stored, query)[:k])


def test_empty_index_and_empty_batch(make_index: MakeIndex) -> None:
    assert make_index().search(query_rows(2), 5) == (IndexMatches(()), IndexMatches(()))
    assert make_index(3).search(query_rows(0), 5) == ()
    spec = ZoneSpec(lo=0.1, hi=0.5, policy="hardest")
    assert make_index().search(query_rows(1), 5, zones=spec, picks=3) == (IndexMatches((), (0, 0, 0), ()),)


@pytest.mark.parametrize("bounds", ["pooled", "rank"])
def test_a_search_takes_absolute_zones_alone(make_index: MakeIndex, bounds: Any) -> None:
    """Pooled ones would make an answer depend on the batch's other queries; ranks would count the same for every query."""
    zones = ZoneSpec(lo=0.1, hi=0.5, bounds=bounds)
    with pytest.raises(InputError, match=f"zones with {bounds} bounds.*give absolute bounds"):
        make_index(3).search(query_rows(1), 5, zones=zones)


def test_ties_go_to_the_older_item_and_nan_never_ranks(make_index: MakeIndex) -> None:
    index = make_index()
    index.add(["b", "a", "c"], np.repeat(target_rows(1), 3, axis=0))
    query = query_rows(1)
    assert [match.id for match in index.search(query, 3)[0].matches] == ["b", "a", "c"]
    assert index.search(np.full((1, 4), np.nan, np.float32), 3)[0].matches == ()


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sets(st.integers(0, 30), min_size=1, max_size=8)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 30), max_size=8)),
        st.tuples(st.sampled_from(["save", "load", "search"]), st.just(set[int]())),
    ),
    max_size=14,
)


@given(operations, st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_operations(
    make_index: MakeIndex, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, set[int]]], screened: bool
) -> None:
    """Against a dict: adds that replace, removals, saves, reloads and searches in any order."""
    path, index = tmp_path_factory.mktemp("index") / "i", make_index(image_storage="f32", screened=screened)
    model: dict[str, np.ndarray] = {}
    saved: dict[str, np.ndarray] | None = None
    for seed, (step, numbers) in enumerate(steps):
        ids = [f"i{n}" for n in sorted(numbers)]
        if step == "add":
            rows = target_rows(len(ids), seed)
            index.add(ids, rows, np.repeat(rows[:, :1, :1], 15, axis=1).reshape(-1, 3, 5), replace=True)
            for id, row in zip(ids, rows, strict=True):
                model.pop(id, None)
                model[id] = row
        elif step == "remove":
            present = [id for id in ids if id in model]
            index.remove(present)
            for id in present:
                del model[id]
        elif step == "save":
            index.save(path)
            saved = dict(model)
        elif step == "load" and saved is not None:
            index, model = GalleryIndex.load(path, verify=True, screened=screened), dict(saved)
        else:
            query = query_rows(1)
            assert_ranked(index.search(query, 100)[0], ranking(model, query[0]))
    assert index.ids == tuple(model)
    for id, row in model.items():
        assert (index.image_tokens(id) == row[0, 0]).all()
    query = query_rows(1)
    assert_ranked(index.search(query, 5)[0], ranking(model, query[0])[:5])


def test_image_tokens_are_written_where_they_are_wanted(make_index: MakeIndex) -> None:
    index = make_index(3, image_storage="f16")
    out = np.empty(index.image_shape, np.float32)
    assert index.image_tokens("i1", out=out) is out
    np.testing.assert_array_equal(out, index.image_tokens("i1"))
    for wrong in (np.empty((5, *index.image_shape), np.float32), np.empty(index.image_shape, np.float16)):
        with pytest.raises(InputError, match="out: expected"):
            index.image_tokens("i1", out=wrong)


@pytest.mark.parametrize("removed", [0, 3, 15, 20])
def test_removed_and_excluded_items_do_not_appear(make_index: MakeIndex, removed: int) -> None:
    """Few and many removed: excluded in place, or the rest gathered."""
    index, queries = make_index(20), query_rows(2)
    gone = [f"i{n}" for n in range(removed)]
    index.remove(gone)
    rows = {f"i{n}": row for n, row in enumerate(target_rows(20)) if n >= removed}
    first, second = index.search(queries, 20, exclude=[["i17", "i18", "i18", "absent", "i0"], []])
    assert_ranked(first, ranking({id: row for id, row in rows.items() if id not in ("i17", "i18", "i0")}, queries[0]))
    assert_ranked(second, ranking(rows, queries[1]))


@pytest.mark.parametrize("keep", [1, 4, 15])
def test_filtered_search_with_removals_and_exclusions(make_index: MakeIndex, keep: int) -> None:
    index, query = make_index(), query_rows(1)
    index.add([f"i{n}" for n in range(20)], target_rows(20), metadata=[{"n": n} for n in range(20)])
    index.remove(["i0"])
    rows = {f"i{n}": row for n, row in enumerate(target_rows(20)) if 0 < n < keep + 1 and n != 2}
    found = index.search(query, 20, filter={"n": {"<": keep + 1}}, exclude=[["i2", "i19"]])[0]
    assert_ranked(found, ranking(rows, query[0]))
    assert all(match.metadata == {"n": int(match.id[1:])} for match in found.matches)


def test_results_do_not_share_metadata_with_the_index(make_index: MakeIndex) -> None:
    index, given_entry = make_index(), {"tags": ["x"]}
    index.add(["a"], target_rows(1), metadata=[given_entry])
    given_entry["tags"].append("y")
    index.search(query_rows(1), 1)[0].matches[0].metadata["tags"].append("z")
    assert index.search(query_rows(1), 1)[0].matches[0].metadata == {"tags": ["x"]}


@pytest.mark.parametrize("removed", [0, 2, 15])
def test_zones_count_candidates_and_pick_from_the_middle(make_index: MakeIndex, removed: int) -> None:
    index, query = make_index(20), query_rows(1)
    index.remove([f"i{n}" for n in range(removed)])
    ranked = ranking({f"i{n}": row for n, row in enumerate(target_rows(20)) if n >= removed}, query[0])
    delta = [ranked[0][1] - score for _, score in ranked]
    found = index.search(query, 1, zones=ZoneSpec(lo=0.2, hi=0.8, policy="hardest"), picks=30)[0]
    near, mid = sum(d < 0.2 for d in delta), sum(0.2 <= d <= 0.8 for d in delta)
    assert found.zone_counts == (near, mid, len(ranked) - near - mid)
    assert [match.id for match in found.picks] == [id for id, _ in ranked[near : near + mid]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": ["a", "b", "a"]}, "1 ids are given more than once: 'a'"),
        ({"ids": ["a", "i0", "i1"]}, "2 ids are in the index already: 'i0', 'i1'; .*replace=True"),
        ({"ids": ["a", "", "b"]}, "non-empty strings"),
        ({"ids": ["a", 1, "b"]}, "non-empty strings"),
        ({"ids": ["a", "\ud800", "b"]}, "not valid Unicode"),
        ({"ids": "abc"}, "single str"),
        ({"target_tokens": target_rows(2)}, r"target_tokens: expected shape \(3, 2, 4\), got \(2, 2, 4\)"),
        ({"target_tokens": target_rows(3)[:, 0]}, "target_tokens: expected shape"),
        ({"target_tokens": target_rows(3).astype(np.float64)}, "expected a float32 or float16 array, got float64"),
        ({"target_tokens": np.full((3, 2, 4), np.nan, np.float32)}, "NaN or infinite"),
        ({"image_tokens": image_rows(3)}, "keeps no image tokens"),
        ({"metadata": [{}]}, "1 metadata entries for 3 ids"),
        ({"metadata": [None, {"x": float("nan")}, None]}, "metadata of 'b' would change in JSON"),
        ({"metadata": [None, {"x": object()}, None]}, "metadata of 'b' is not JSON"),
        ({"metadata": [None, {1: 2}, None]}, "metadata of 'b' would change in JSON"),
        ({"metadata": [None, {"x": "\ud800"}, None]}, "metadata of 'b' is not JSON"),
        ({"metadata": [None, [1], None]}, "expected a JSON object, got list"),
    ],
)
def test_adds_that_are_refused_change_nothing(make_index: MakeIndex, arguments: dict[str, Any], message: str) -> None:
    index = make_index(2)
    before = index.search(query_rows(1), 9)
    with pytest.raises(InputError, match=message):
        index.add(**({"ids": ["a", "b", "c"], "target_tokens": target_rows(3)} | arguments))
    assert index.ids == ("i0", "i1")
    assert index.search(query_rows(1), 9) == before


def test_image_tokens(make_index: MakeIndex) -> None:
    index = make_index(3, image_storage="f16")
    np.testing.assert_array_equal(index.image_tokens("i1"), image_rows(3)[1].astype(np.float16).astype(np.float32))
    with pytest.raises(InputError, match="'absent' is not in the index"):
        index.image_tokens("absent")
    with pytest.raises(InputError, match="none were given"):
        index.add(["a"], target_rows(1))
    with pytest.raises(InputError, match="beyond float16; choose f32"):
        index.add(["a"], target_rows(1), np.full((1, 3, 5), 1e5, np.float32))
    with pytest.raises(InputError, match="pass its image instead"):
        make_index(1).image_tokens("i0")


@pytest.mark.parametrize("storage", ["f32", "f16"])
def test_target_tokens(make_index: MakeIndex, tmp_path: Path, storage: str) -> None:
    index, rows = make_index(3, storage=storage), target_rows(3)
    stored = rows.astype(np.float16).astype(np.float32) if storage == "f16" else rows
    assert index.target_tokens("i1").dtype == np.float32
    np.testing.assert_array_equal(index.target_tokens("i1"), stored[1])
    index.add(["i1"], rows[:1], replace=True)
    index.remove(["i0"])
    index.save(tmp_path / "index")
    loaded = GalleryIndex.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded.target_tokens("i1"), stored[0])
    np.testing.assert_array_equal(loaded.target_tokens("i2"), stored[2])
    loaded.target_tokens("i2")[:] = 7  # a copy: the index is not changed through it
    np.testing.assert_array_equal(loaded.target_tokens("i2"), stored[2])
    for absent in ("absent", "i0"):
        with pytest.raises(InputError, match=f"'{absent}' is not in the index"):
            loaded.target_tokens(absent)


def test_the_caller_may_reuse_its_arrays(make_index: MakeIndex) -> None:
    index, rows = make_index(), target_rows(3)
    index.add(["a", "b", "c"], rows)
    before = index.search(query_rows(1), 3)
    rows[:] = 0
    assert index.search(query_rows(1), 3) == before


def test_unknown_ids(make_index: MakeIndex) -> None:
    index = make_index(3)
    with pytest.raises(InputError, match="7 ids are not in the index: 'x0', 'x1', 'x2', 'x3', 'x4', …"):
        index.remove(["i0", *(f"x{n}" for n in range(7))])
    with pytest.raises(InputError, match="single str"):
        index.remove("i0")
    assert len(index) == 3
    index.remove(["i0", "i0"])
    assert "i0" not in index
    assert len(index) == 2


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_k_is_a_positive_whole_number(make_index: MakeIndex, k: object) -> None:
    with pytest.raises(InputError, match="k must be a whole number"):
        make_index(1).search(query_rows(1), k)


@pytest.mark.parametrize("queries", [query_rows(1)[0], query_rows(1)[:, :3], query_rows(1).astype(np.float64)])
def test_queries_that_do_not_fit(make_index: MakeIndex, queries: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"expected queries of shape \(B, 4\) float32"):
        make_index(1).search(queries, 1)


def test_picks_need_zones(make_index: MakeIndex) -> None:
    with pytest.raises(InputError, match="picks need zones"):
        make_index(3).search(query_rows(1), 1, picks=2)


def test_exclusions_that_do_not_fit(make_index: MakeIndex) -> None:
    with pytest.raises(InputError, match="1 exclusions for 2 queries"):
        make_index(1).search(query_rows(2), 1, exclude=[[]])
    with pytest.raises(InputError, match="single str"):
        make_index(1).search(query_rows(1), 1, exclude=["i0"])


def test_storage_names() -> None:
    with pytest.raises(InputError, match="storage is f32 or f16"):
        GalleryIndex(model_hash="m", target_shape=(2, 4), image_shape=(3, 5), storage="int4")


def test_searches_while_another_thread_writes(make_index: MakeIndex, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every search sees one whole state: all of a batch of items that are added and removed together, or none."""
    index, path, stop = make_index(50), tmp_path_factory.mktemp("index") / "i", threading.Event()
    problems: list[str] = []

    def search() -> None:
        while not stop.is_set():
            ids = {match.id for match in index.search(query_rows(1), 100)[0].matches}
            extra = {id for id in ids if id.startswith("x")}
            if len(ids - extra) != 50 or len(extra) not in (0, 7):
                problems.append(f"{len(ids)} ids, {len(extra)} of them extra")

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for round_ in range(30):
        index.add([f"x{n}" for n in range(7)], target_rows(7, round_))
        if round_ % 3 == 0:
            index.save(path)
        index.remove([f"x{n}" for n in range(7)])
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
