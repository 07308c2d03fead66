"""What searches of an unchanged index share: the screen, the view, and what passed a filter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from support.rankings import assert_ranked, ranking
from support.samples import query_rows, target_rows

from dqe_engine.index import GalleryIndex, gallery, searching
from dqe_engine.index.columns import ScreenCache
from dqe_engine.index.filters import compile_filter, filter_key
from dqe_engine.zones import Screen, ZoneSelection
from dqe_engine.zones.request import shards_of

MakeIndex = Callable[..., GalleryIndex]


def test_a_screened_index_finds_the_same_and_reads_less(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ZoneSelection] = []
    select = searching.select_zones
    monkeypatch.setattr(searching, "select_zones", lambda *args, **options: seen.append(select(*args, **options)) or seen[-1])
    plain, screened = make_index(3000, screened=False), make_index(3000, screened=True)
    queries = query_rows(2)
    for _ in range(2):
        assert screened.search(queries, 5, exclude=[["i7"], []]) == plain.search(queries, 5, exclude=[["i7"], []])
        for index in (plain, screened):
            index.add(["new", "newer"], target_rows(2, 9), replace=True)
    assert [found.rescored is None for found in seen] == [False, True, False, True]
    assert all(found.rescored < 3000 for found in seen if found.rescored is not None)


def test_indexes_are_screened_until_they_are_large(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_index(10)
    monkeypatch.setattr(gallery, "SCREENED_BYTES", index._targets.shards()[1].nbytes)
    assert index._snapshot([()])[0].screen is not None
    index.add(["one more"], target_rows(1))
    assert index._snapshot([()])[0].screen is None
    index.screened = True
    assert index._snapshot([()])[0].screen is not None


def test_a_search_looks_again_only_where_something_changed(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(10)

    def looked_again() -> bool:
        before = index._views.get(index.screened)
        index.search(query_rows(1), 3)
        return index._views[index.screened] is not before

    assert looked_again()
    assert not looked_again()
    changes: list[Callable[[], None]] = [
        lambda: index.add(["new"], target_rows(1)),
        lambda: index.add(["new"], target_rows(1), replace=True),
        lambda: index.remove(["i3"]),
        lambda: index.save(tmp_path / "index"),
    ]
    for change in changes:
        change()
        assert looked_again()
        assert not looked_again()


def test_a_change_while_a_search_prepares_is_seen_by_the_next(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index, screen = make_index(10), ScreenCache.screen

    def slow_screen(cache: ScreenCache, *shards: Any) -> Any:
        monkeypatch.setattr(ScreenCache, "screen", screen)
        index.remove(["i3"])  # as another thread might
        return cache.screen(*shards)

    monkeypatch.setattr(ScreenCache, "screen", slow_screen)
    assert len(index.search(query_rows(1), 20)[0].matches) == 10  # the index as it was when the search began
    assert len(index.search(query_rows(1), 20)[0].matches) == 9


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
@pytest.mark.parametrize("least", [0, 3, 12, 20])
def test_what_passes_a_filter_is_asked_once(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, least: int, kept_bytes: int) -> None:
    """All, many, few and none pass; another filter, or a change, asks again."""
    monkeypatch.setattr(searching, "KEPT_BYTES", kept_bytes)
    compiled: list[dict[str, Any]] = []

    def counted(conditions: dict[str, Any]) -> Callable[[Any], bool]:
        predicate = compile_filter(conditions)
        return lambda metadata: bool(compiled.append(conditions)) or predicate(metadata)

    monkeypatch.setattr(searching, "compile_filter", counted)
    index, queries = make_index(), query_rows(2)
    index.add([f"i{n}" for n in range(20)], target_rows(20), metadata=[{"n": n} for n in range(20)])
    rows = dict(zip(index.ids, target_rows(20), strict=True))

    def check(expected: dict[str, np.ndarray], conditions: dict[str, Any]) -> None:
        found = index.search(queries, 30, exclude=[["i15", "i2"], []], filter=conditions)
        left = {id: row for id, row in expected.items() if id not in ("i15", "i2")}
        assert_ranked(found[0], ranking(left, queries[0]))
        assert_ranked(found[1], ranking(expected, queries[1]))

    passing = {id: row for id, row in rows.items() if int(id[1:]) >= least}
    for _ in range(3):
        check(passing, {"n": {">=": least}})
    assert len(compiled) == 20
    check({}, {"n": {">=": 100}})
    assert len(compiled) == 40
    index.remove(["i19"])
    check({id: row for id, row in passing.items() if id != "i19"}, {"n": {">=": least}})
    assert len(compiled) == 60


def test_filters_are_told_apart() -> None:
    filters: list[dict[str, Any]] = [
        {"a": 1}, {"a": True}, {"a": "1"}, {"a": None}, {"a": {"!=": 1}}, {"a": {"in": [1]}}, {"a": {"in": [1, "1"]}}, {"b": 1},
        {"a": 1, "b": 1}, {"a": {">": 1}}, {"a": {">": 1, "<": 2}}, {},
    ]  # fmt: skip
    assert len({filter_key(one) for one in filters}) == len(filters)
    assert filter_key({"a": {"in": (1, 2)}}) == filter_key({"a": {"in": [1, 2]}})
    assert filter_key(MappingProxyType({"a": MappingProxyType({">": 1})})) == filter_key({"a": {">": 1}})


def test_only_some_filters_are_remembered(make_index: MakeIndex) -> None:
    index = make_index(10)
    for number in range(3 * searching.KEPT_FILTERS):
        index.search(query_rows(1), 3, filter={"n": number})
        assert 1 <= len(index._views[None].candidates) <= searching.KEPT_FILTERS


def test_the_screen_outlives_a_save_and_a_compaction(make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is quantised once, wherever it comes to lie; results are those of an index without a screen."""
    quantised: list[int] = []
    build = Screen.build
    monkeypatch.setattr(
        Screen, "build", lambda items, **options: quantised.append(sum(map(len, shards_of(items)))) or build(items, **options)
    )
    index, plain = make_index(40, screened=True), make_index(40, screened=False)
    queries = query_rows(3)

    def check(rows: int) -> None:
        assert index.search(queries, 50) == plain.search(queries, 50)
        assert sum(quantised) == rows

    check(40)
    for round_ in range(3):
        for one, name in ((index, "index"), (plain, "plain")):
            one.add([f"r{round_}-{n}" for n in range(5)], target_rows(5, round_))
            one.save(tmp_path / name)
        check(45 + 5 * round_)
    for one, name in ((index, "index"), (plain, "plain")):
        one.remove([f"i{n}" for n in range(30)])
        one.add(["last"], target_rows(1, 9))
        one.save(tmp_path / name)  # more than half are gone: compacted
        assert len(one) == len(one._ids) == 26
    check(56)
    loaded = GalleryIndex.load(tmp_path / "index", screened=True)
    loaded.add(["later"], target_rows(1, 10))
    plain.add(["later"], target_rows(1, 10))
    assert loaded.search(queries, 50) == plain.search(queries, 50)
    loaded.save(tmp_path / "index")
    assert loaded.search(queries, 50) == plain.search(queries, 50)
    assert sum(quantised) == 56 + 27
