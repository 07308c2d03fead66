"""Facets and pages against what a walk over all items says."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support.samples import target_rows

from dqe_engine.errors import InputError
from dqe_engine.index import GalleryIndex, Snapshot
from dqe_engine.index.facets import LONGEST, MOST_KEYS, Facet, FacetValue

BIG = 2**53 + 1
VALUES: tuple[Any, ...] = (
    "red", "blue", "", "1", 1, 1.0, 0, -0.0, 2.5, -3, BIG, -BIG, 10**30, True, False, None, [], {}, ["red"], ["red", "red", "blue"],
    [1, 1.0, True],
    ["1", None, [1], {}, False], [BIG, 2.5], {"red": 1}, "ü", "\0",
)  # fmt: skip


@pytest.fixture
def make_index() -> Callable[[list[Any]], GalleryIndex]:
    def make(metadata: list[Any]) -> GalleryIndex:
        index = GalleryIndex(model_hash="m" * 32, target_shape=(2, 4), image_shape=(3, 5))
        index.add([f"i{n}" for n in range(len(metadata))], target_rows(len(metadata)), None, metadata)
        return index

    return make


def kind_of(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else None


def walked(snapshot: Snapshot, filter: Any = None) -> tuple[int, dict[tuple[str, str, bool], tuple[Counter[Any], int]]]:
    """Total; counts of values, and items without the key, by key, kind and whether they are listed."""
    items = [item.metadata or {} for item in snapshot.items(filter)]
    counts: dict[tuple[str, str, bool], Counter[Any]] = {}
    for metadata in items:
        for key, value in metadata.items():
            listed = isinstance(value, list)
            for kind, element in {(kind_of(element), element) for element in (value if listed else [value]) if kind_of(element)}:
                counts.setdefault((key, str(kind), listed), Counter())[element] += 1
    return len(items), {name: (count, sum(name[0] not in metadata for metadata in items)) for name, count in counts.items()}


def check(snapshot: Snapshot, filter: Any = None, most: int = 1000) -> None:
    found = snapshot.facets(filter, most=most)
    total, expected = walked(snapshot, filter)
    assert found.total == total
    assert [(facet.key, facet.kind, facet.listed) for facet in found.facets] == sorted(expected)
    for facet in found.facets:
        counts, missing = expected[facet.key, facet.kind, facet.listed]
        assert facet.missing == missing
        assert facet.distinct == len(counts)
        assert len(facet.values) == min(most, len(counts))
        assert all(counts[value.value] == value.count > 0 for value in facet.values)
        assert [value.count for value in facet.values] == sorted(counts.values(), reverse=True)[:most]
        assert all(type(value.value) in {"text": (str,), "number": (int, float), "boolean": (bool,)}[facet.kind] for value in facet.values)
        number = facet.kind == "number"
        assert (facet.least, facet.most) == ((min(counts), max(counts)) if number else (None, None))


def test_facets_are_what_a_walk_finds(make_index: Callable[[list[Any]], GalleryIndex]) -> None:
    rng = random.Random(0)

    def entry() -> Any:
        return rng.choice((None, {})) if rng.random() < 0.1 else {key: rng.choice(VALUES) for key in "abcd" if rng.random() < 0.7}

    for size in (0, 1, 63, 64, 65, 300):
        index = make_index([entry() for _ in range(size)])
        before = index.snapshot()
        expected = before.facets({"a": {"exists": True}})
        if size > 1:
            index.remove([f"i{n}" for n in range(0, size, 3)])
            index.add([f"n{n}" for n in range(size)], target_rows(size), None, [entry() for _ in range(size)])
            index.update_metadata({f"n{n}": entry() for n in range(0, size, 2)})
        for snapshot in (before, index.snapshot()):
            for filter in (None, {"a": "red"}, {"b": {"<": 5}}, {"or": [{"c": True}, {"d": {"exists": False}}]}, {"a": "nowhere"}):
                check(snapshot, filter)
                check(snapshot, filter, most=2)
        assert before.facets({"a": {"exists": True}}) == expected


def test_what_a_page_shows(make_index: Callable[[list[Any]], GalleryIndex]) -> None:
    index = make_index([
        {"brand": "x", "price": 5, "sale": True, "tags": ["new", "new", "red"]}, {"brand": "y", "price": 2.5, "sale": False},
        {"brand": "x", "price": "call us", "tags": []}, None,
    ])  # fmt: skip
    found = index.snapshot().facets()
    assert found.total == 4
    assert found.facets == (
        Facet("brand", "text", False, (FacetValue("x", 2), FacetValue("y", 1)), 2, 1),
        Facet("price", "number", False, (FacetValue(2.5, 1), FacetValue(5.0, 1)), 2, 1, 2.5, 5.0),
        Facet("price", "text", False, (FacetValue("call us", 1),), 1, 1),
        Facet("sale", "boolean", False, (FacetValue(False, 1), FacetValue(True, 1)), 2, 2),
        Facet("tags", "text", True, (FacetValue("new", 1), FacetValue("red", 1)), 2, 2),
    )
    assert [facet.key for facet in index.snapshot().facets({"brand": "y"}).facets] == ["brand", "price", "sale"]


def test_a_snapshot_says_the_same_while_others_add(make_index: Callable[[list[Any]], GalleryIndex]) -> None:
    rng = random.Random(1)
    index, over = make_index([{key: rng.choice(VALUES) for key in "abc"} for _ in range(100)]), threading.Event()
    snapshot = index.snapshot()
    expected, page = snapshot.facets({"a": {"exists": True}}), snapshot.page({"b": "red"}, limit=1000)
    check(snapshot)

    def add() -> None:
        n = 0
        while not over.is_set() and n < 5000:
            n += 1
            values = (*VALUES, f"new{n}", [f"new{n}"])
            index.add([f"n{n}"], target_rows(1), None, [{key: rng.choice(values) for key in ("a", f"key{n % 50}")}])

    thread = threading.Thread(target=add)
    thread.start()
    try:
        for _ in range(100):
            assert snapshot.facets({"a": {"exists": True}}) == expected
            assert snapshot.page({"b": "red"}, limit=1000) == page
        check(index.snapshot(), {"a": "red"})
    finally:
        over.set()
        thread.join()


def test_equal_counts_are_in_the_order_they_came(make_index: Callable[[list[Any]], GalleryIndex]) -> None:
    index = make_index([{"k": value} for value in ("d", "b", "c", "a", "c", "e")])
    (facet,) = index.snapshot().facets(most=3).facets
    assert [value.value for value in facet.values] == ["c", "d", "b"]


def test_what_comes_out_is_bounded(make_index: Callable[[list[Any]], GalleryIndex]) -> None:
    index = make_index(
        [{"k": "x" * LONGEST, "l" * LONGEST: 1, "m" * (LONGEST + 1): 1}, {"k": "x" * (LONGEST + 1)}]
        + [{"common": n, f"key{n}": "v"} for n in range(2 * MOST_KEYS)]
    )
    found = index.snapshot().facets()
    keys = [facet.key for facet in found.facets]
    assert len(keys) <= MOST_KEYS
    assert "common" in keys
    assert "key0" in keys
    assert "key399" not in keys
    assert "l" * LONGEST in keys
    assert "m" * (LONGEST + 1) not in keys
    facet = found.facets[keys.index("k")]
    assert facet.values == (FacetValue("x" * LONGEST, 1),)
    assert facet.distinct == 2
    assert len(found.facets[keys.index("common")].values) == 50


@pytest.mark.parametrize("most", [0, -1, 1.5, "3", None, True])
def test_counts_are_checked(make_index: Callable[[list[Any]], GalleryIndex], most: Any) -> None:
    snapshot = make_index([{}]).snapshot()
    with pytest.raises(InputError, match="most must be a whole number"):
        snapshot.facets(most=most)
    with pytest.raises(InputError, match="limit must be a whole number"):
        snapshot.page(limit=most)
    with pytest.raises(InputError):
        snapshot.facets({"k": {}})


@pytest.mark.parametrize("filter", [None, {"n": {">=": 30}}, {"even": True}, {"even": "neither"}])
@pytest.mark.parametrize("limit", [1, 2, 63, 64, 65, 1000])
def test_pages_are_a_walk(make_index: Callable[[list[Any]], GalleryIndex], filter: Any, limit: int) -> None:
    for gone in ((), range(0, 150, 7), range(150)):
        index = make_index([{"n": n, "even": n % 2 == 0} for n in range(150)])
        if gone:
            index.remove([f"i{n}" for n in gone])
        snapshot = index.snapshot()
        expected = list(snapshot.items(filter))
        for by_id in (False, True):
            found, after, pages = [], None, 0
            while True:
                page = snapshot.page(filter, after=after, limit=limit)
                assert page.total == len(expected)
                assert len(page.items) <= limit
                found += page.items
                pages += 1
                if page.next is None:
                    break
                after = page.items[-1].id if by_id else page.next
            assert found == expected
            assert pages == max(1, -(-len(expected) // limit))


def test_pages_begin_behind_what_is_gone(make_index: Callable[[list[Any]], GalleryIndex]) -> None:
    index = make_index([None] * 5)
    index.remove(["i1", "i2"])
    assert [item.id for item in index.snapshot().page(after="i1").items] == ["i3", "i4"]
    index.update_metadata({"i0": {"n": 1}})
    assert [item.id for item in index.snapshot().page(after="i0").items] == []
    assert [item.id for item in index.snapshot().page(after=0).items] == ["i3", "i4", "i0"]
    assert [item.id for item in index.snapshot().page(after=10**9).items] == []
    assert [item.id for item in index.snapshot().page(after=-5).items] == ["i3", "i4", "i0"]
    with pytest.raises(InputError, match=r"^after: 'nowhere' is not in the index; begin again without it$"):
        index.snapshot().page(after="nowhere")
