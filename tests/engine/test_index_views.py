"""What searches of an unchanged index share: the screen and the view; and that filters follow the changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rankings import assert_ranked, ranking
from support.samples import query_rows, target_rows

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.index import GalleryIndex, snapshot, writer
from dqe_engine.index.columns import ScreenCache
from dqe_engine.zones import Screen, ZoneSelection
from dqe_engine.zones.arrays import shards_of

MakeIndex = Callable[..., GalleryIndex]


def test_a_screened_index_finds_the_same_and_reads_less(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ZoneSelection] = []
    select = snapshot.select_zones
    monkeypatch.setattr(snapshot, "select_zones", lambda *args, **options: seen.append(select(*args, **options)) or seen[-1])
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
    monkeypatch.setattr(writer, "SCREENED_BYTES", index.stats().target_bytes)
    index.screened = None
    assert index.snapshot().screens is not None
    index.add(["one more"], target_rows(1))
    assert index.snapshot().screens is None
    index.screened = True
    assert index.snapshot().screens is not None


def test_a_change_while_a_search_prepares_is_seen_by_the_next(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index, screen = make_index(10), ScreenCache.screen

    def slow_screen(cache: ScreenCache, *shards: Any, threads: int) -> Any:
        monkeypatch.setattr(ScreenCache, "screen", screen)
        index.remove(["i3"])  # as another thread might
        return cache.screen(*shards, threads=threads)

    monkeypatch.setattr(ScreenCache, "screen", slow_screen)
    assert len(index.search(query_rows(1), 20)[0].matches) == 10  # the index as it was when the search began
    assert len(index.search(query_rows(1), 20)[0].matches) == 9


@pytest.mark.parametrize("least", [0, 3, 12, 20])
def test_filters_follow_what_changes(make_index: MakeIndex, tmp_path: Path, least: int) -> None:
    """All, many, few and none pass; adding, replacing, removing, compacting and loading are seen by the next search."""
    index, queries, rows = make_index(), query_rows(2), target_rows(20)
    conditions = {"n": {">=": least}}

    def check(numbers: dict[str, int], searched: GalleryIndex) -> None:
        for _ in range(2):
            found = searched.search(queries, 30, exclude=[["i15", "i2"], []], filter=conditions)
            passing = {id: rows[int(id[1:])] for id, n in numbers.items() if n >= least}
            assert_ranked(found[0], ranking({id: row for id, row in passing.items() if id not in ("i15", "i2")}, queries[0]))
            assert_ranked(found[1], ranking(passing, queries[1]))

    numbers = {}
    for some in (range(10), range(10, 20)):
        index.add([f"i{n}" for n in some], rows[some.start : some.stop], metadata=[{"n": n} for n in some])
        numbers |= {f"i{n}": n for n in some}
        check(numbers, index)
    index.add(["i4"], rows[4:5], metadata=[{"n": 100}], replace=True)
    del numbers["i4"]
    numbers["i4"] = 100
    check(numbers, index)
    index.remove([f"i{n}" for n in (19, *range(5, 16))])
    numbers = {id: n for id, n in numbers.items() if id[1:] not in ("19", *map(str, range(5, 16)))}
    check(numbers, index)
    index.save(tmp_path / "index")
    assert index.stats().removed == 0, "compacted"
    check(numbers, index)
    index.add(["i7"], rows[7:8], metadata=[{"n": 7}])
    check(numbers | {"i7": 7}, index)
    index.save(tmp_path / "index")
    check(numbers | {"i7": 7}, GalleryIndex.load(tmp_path / "index"))


def test_picks_do_not_depend_on_how_many_items_pass(make_index: MakeIndex) -> None:
    """A draw belongs to the item, whichever others a filter leaves."""
    index = make_index()
    index.add([f"i{n}" for n in range(300)], target_rows(300), metadata=[{"n": n} for n in range(300)])
    zones = ZoneSpec(lo=-10, hi=10, policy="uniform", seed=4)
    of_all, of_some = (
        [match.id for match in index.search(query_rows(1), 1, zones=zones, picks=300, filter={"n": {"<": most}})[0].picks]
        for most in (290, 70)
    )
    assert [id for id in of_all if int(id[1:]) < 70] == of_some


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
        assert (len(one), one.stats().removed) == (26, 0)
    check(56)
    loaded = GalleryIndex.load(tmp_path / "index", screened=True)
    loaded.add(["later"], target_rows(1, 10))
    plain.add(["later"], target_rows(1, 10))
    assert loaded.search(queries, 50) == plain.search(queries, 50)
    loaded.save(tmp_path / "index")
    assert loaded.search(queries, 50) == plain.search(queries, 50)
    assert sum(quantised) == 56 + 27


def test_matches_own_their_metadata(make_index: MakeIndex) -> None:
    index = make_index()
    index.add(["a"], target_rows(1), metadata=[{"tags": ["x", ["y"]], "size": {"eu": [40]}}])
    for _ in range(2):
        found = index.search(query_rows(1), 1)[0].matches[0].metadata
        assert found == {"tags": ["x", ["y"]], "size": {"eu": [40]}}
        found["tags"][1].append("z")
        found["size"]["eu"].append(41)
