"""Items in Milvus Lite: the single index's answers, filters included, proofs where they hold, and a Milvus that does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.samples import query_rows, target_rows, unit

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, IndexFormatError, InputError, NoAnswerError
from dqe_engine.index import GalleryIndex, IndexMatches, milvus_search
from dqe_engine.index.filters import compile_filter
from dqe_engine.index.milvus import MilvusIndex
from dqe_engine.index.milvus_filters import expression_of
from dqe_engine.query import Query

pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'dqe-engine[milvus]'")
grpc = pytest.importorskip("grpc", reason="grpc is not installed: pip install 'dqe-engine[milvus]'")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install 'dqe-engine[milvus]'")

MakeIndex = Callable[..., GalleryIndex]
ODD = {"tags": ["sale", 3, True, None], "brand": 'a"b\\', "big": 2**70, "n": 1.0, "flag": True, "nothing": None, "deep": {"x": 1}, "ü": "é"}
FILTERS: tuple[tuple[Any, bool], ...] = (
    ({"n": {">=": 3, "<": 30}}, True),
    ({"brand": "a"}, True),
    ({"brand": {"in": ["a", "c"]}}, True),
    ({"brand": {"in": ["a", "c", 7]}}, False),
    ({"n": {"in": [1, 2.0, True]}}, False),
    ({"n": {"in": [1, 2.5]}}, True),
    ({"or": [{"n": 2}, {"n": True}]}, False),
    ({"or": [{"n": 2}, {"or": [{"n": 4.0}, {"n": "a"}]}]}, False),
    ({"or": [{"n": 2}, {"brand": "a"}, {"flag": True}]}, True),
    ({"and": [{"tags": {"contains": "x"}}, {"tags": {"contains": 4}}]}, False),
    ({"tags": {"contains": 4}}, True),
    ({"n": 1}, True),
    ({"flag": True}, True),
    ({"tags": {"contains": "sale"}}, True),
    ({"ü": "é"}, True),
    ({"brand": {"in": []}}, True),
    ({"or": [{"brand": "b"}, {"n": {"<": 5}}]}, True),
    ({"brand": "a", "n": {"!=": 4}}, False),
    ({"brand": 'a"b\\'}, False),
    ({"big": {">": 2**53}}, False),
    ({"big": {">": 2**53 - 1}}, True),
    ({"big": 2**70}, False),
    ({"not": [{"brand": "a"}]}, False),
    ({"n": {"exists": False}}, False),
    ({"nothing": None}, False),
    ({"or": [{"brand": "b"}, {"deep": {"exists": True}}]}, False),
    ({"n": {"<": -1}}, True),
)


def clustered(rng: np.random.Generator, size: int, spread: float) -> np.ndarray:
    """Items of two tokens that lie close together, as trained ones do."""
    return unit(unit(rng.standard_normal((size, 1, 4))) + spread * rng.standard_normal((size, 2, 4)))


def filled(make_index: MakeIndex, rows: np.ndarray, **options: Any) -> GalleryIndex:
    index = make_index(**options)
    metadata: list[Any] = [None if n % 7 == 3 else {"n": n, "brand": "abc"[n % 3], "tags": ["x", n]} for n in range(len(rows))]
    metadata[0] = ODD
    index.add([f"i{n}" for n in range(len(rows))], rows, metadata=metadata)
    return index


@pytest.fixture(scope="module", autouse=True)
def servers() -> Iterator[None]:
    """Milvus Lite serves each file from a thread, until somebody ends it."""
    yield
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_all()


@pytest.fixture
def saved(make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> GalleryIndex:
    index = filled(make_index, clustered(rng, 600, 0.05))
    index.save(tmp_path / "index")
    return index


@pytest.fixture
def there(saved: GalleryIndex, tmp_path: Path) -> Iterator[MilvusIndex]:
    with MilvusIndex.create(str(tmp_path / "milvus.db"), "garments", saved, candidates=16) as made:
        yield made


def test_answers_are_the_single_indexs_and_proved(there: MilvusIndex, saved: GalleryIndex) -> None:
    assert len(there) == 600
    queries = query_rows(4)
    exclude = [["i5", "i17", "unknown"], [], [f"i{n}" for n in range(0, 600, 2)], ["i0"]]
    assert there.search(queries, 10) == saved.search(queries, 10)
    assert there.search(queries, 10, exclude=exclude) == saved.search(queries, 10, exclude=exclude)
    assert there.search(queries, 2000) == saved.search(queries, 2000), "all of them"
    for filter, whole in FILTERS:
        assert there.expression(filter)[1] is whole, filter
        assert there.search(queries, 10, filter=filter, exclude=exclude) == saved.search(queries, 10, filter=filter, exclude=exclude), (
            filter
        )
    for lo, hi in ((0.0, 0.01), (0.01, 0.05), (0.1, 3.0), (-1.0, 0.0)):
        spec = ZoneSpec(lo=lo, hi=hi, policy="hardest")
        options: dict[str, Any] = {"zones": spec, "picks": 5, "exclude": exclude}
        assert there.search(queries, 10, **options) == saved.search(queries, 10, **options)


def test_ids_may_hold_what_expressions_are_made_of(make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each id is found as itself, and removed as itself, whatever it looks like to Milvus's grammar."""
    ids = ["it's.jpg", 'a"b', "back\\slash", "\\", '\\"', "two\nlines", "tab\t", "{x}", "%", "é/ü", '"] or id != ["', "both'\"\\", "\x01"]
    index = make_index()
    index.add(ids, clustered(rng, len(ids), 0.05))
    index.save(tmp_path / "index")
    with MilvusIndex.create(str(tmp_path / "milvus.db"), "garments", index) as there:
        for id in ids:
            row = there.snapshot().row(id)
            assert row is not None
            assert row == index.snapshot().row(id), id
        assert [len(there.entities([id], ["id"])) for id in ids] == [1] * len(ids)
        assert "it" not in there
        index.remove(ids[:-2])
        index.save(tmp_path / "index")
        assert there.sync(index)[1] == len(ids) - 2
        assert [id in there for id in ids] == [False] * (len(ids) - 2) + [True] * 2


def test_what_cannot_be_proved_is_not_called_exact(make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> None:
    """Items whose tokens lie far apart have bounds that say little; few candidates then leave answers open, and some of them wrong."""
    index = filled(make_index, target_rows(500))
    index.save(tmp_path / "index")
    queries = query_rows(40)
    expected = index.search(queries, 10)
    with MilvusIndex.create(str(tmp_path / "milvus.db"), "garments", index, candidates=8, most=56) as there:
        found = there.search(queries, 10)
        assert not all(one.exact for one in found)
        wrong = [b for b, one in enumerate(found) if one.matches != alone(index, queries[b])]
        assert wrong
        assert not any(found[b].exact for b in wrong)
        there.most = 16384
        assert [one.matches for one in there.search(queries, 10)] == [alone(index, query) for query in queries]
    assert len(expected) == 40


def alone(index: GalleryIndex, query: np.ndarray, k: int = 10) -> Any:
    return index.search(query[None], k)[0].matches


def test_ties_and_items_that_are_all_equal(make_index: MakeIndex, tmp_path: Path) -> None:
    """A tie with what was not fetched proves nothing: an older item may be there."""
    index = make_index()
    index.add([f"z{n}" for n in range(50)], np.repeat(target_rows(1), 50, axis=0))
    index.save(tmp_path / "index")
    with MilvusIndex.create(str(tmp_path / "milvus.db"), "same", index, candidates=4, most=20) as there:
        (found,) = there.search(query_rows(1), 3)
        assert not found.exact
        there.most = 64
        (found,) = there.search(query_rows(1), 3)
        assert found.exact
        assert [match.id for match in found.matches] == ["z0", "z1", "z2"]
        zero = there.search(np.zeros((1, 4), np.float32), 3)[0]
        assert (zero.exact, [match.id for match in zero.matches]) == (True, ["z0", "z1", "z2"])


@pytest.mark.parametrize("storage", ["f32", "f16"])
def test_what_is_written_is_read_at_once(storage: str, make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> None:
    index = filled(make_index, clustered(rng, 60, 0.1), storage=storage)
    index.save(tmp_path / "index")
    queries = query_rows(3)
    with MilvusIndex.create(str(tmp_path / "milvus.db"), "garments", index) as there:
        assert there.sync(index) == (0, 0)
        index.remove(["i3", "i59"])
        index.update_metadata({"i4": {"n": 4000}})
        index.add(["i7", "new"], target_rows(2, 9), replace=True)
        with pytest.raises(InputError, match="not saved"):
            there.sync(index)
        index.save(tmp_path / "index")
        assert there.sync(index) == (3, 2)
        assert there.search(queries, 100) == index.search(queries, 100)
        assert there.search(queries, 5, filter={"n": 4000}) == index.search(queries, 5, filter={"n": 4000})
        index.compact()
        assert there.sync(index)[0] == len(index), "rows have other numbers now"
        assert there.search(queries, 100) == index.search(queries, 100)
    with MilvusIndex(str(tmp_path / "milvus.db"), "garments") as again:  # without the index that it was made from
        assert again.target_shape == (2, 4)
        assert again.search(queries, 100) == index.search(queries, 100)


def test_a_server_proves_nothing_unless_its_searches_are_exhaustive(there: MilvusIndex, saved: GalleryIndex, tmp_path: Path) -> None:
    """Here a server is what Milvus Lite listens with."""
    from milvus_lite.server_manager import server_manager_instance

    address = server_manager_instance.start_and_get_uri(str(tmp_path / "milvus.db"))
    queries = query_rows(2)
    for exhaustive, proved in ((None, False), (False, False), (True, True)):
        with MilvusIndex(address, "garments", exhaustive=exhaustive) as served:
            found = served.search(queries, 5)
            assert [one.exact for one in found] == [proved] * 2
            assert [one.matches for one in found] == [one.matches for one in saved.search(queries, 5)]
    there.close()
    with MilvusIndex.create(str(tmp_path / "milvus.db"), "garments", saved, index_type="HNSW", replace=True) as approximate:
        assert [one.exact for one in approximate.search(queries, 5)] == [False, False]


def test_an_approximate_index_or_other_vectors_prove_nothing(
    there: MilvusIndex, saved: GalleryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = query_rows(2)
    nearest = there.nearest
    monkeypatch.setattr(there, "flat", False)
    assert [one.exact for one in there.search(queries, 5)] == [False, False]
    monkeypatch.setattr(there, "flat", True)
    assert [one.exact for one in there.search(queries, 5)] == [True, True]

    def off(*arguments: Any) -> Any:
        return [[{**hit, "distance": hit["distance"] + 1e-4} for hit in hits] for hits in nearest(*arguments)]

    monkeypatch.setattr(there, "nearest", off)
    assert [one.exact for one in there.search(queries, 5)] == [False, False]


def test_milvus_away_is_one_line(tmp_path: Path, there: MilvusIndex, saved: GalleryIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymilvus.exceptions import MilvusException

    with pytest.raises(NoAnswerError, match=r"^Milvus at http://127.0.0.1:9 gave no answer \(Fail connecting .*\); check that it runs"):
        MilvusIndex("http://name:secret@127.0.0.1:9", "garments", timeout=1)
    with pytest.raises(BackendError, match=r"gave no answer \(Open local milvus failed"):
        MilvusIndex(str(tmp_path / "no" / "folder.db"), "garments")
    with pytest.raises(IndexFormatError, match="has no collection 'other'"):
        MilvusIndex(str(tmp_path / "milvus.db"), "other")
    with pytest.raises(InputError, match="has a collection 'garments' already"):
        MilvusIndex.create(str(tmp_path / "milvus.db"), "garments", saved)

    def gone(*arguments: Any, **options: Any) -> Any:
        raise MilvusException(message="the server\nis down")

    monkeypatch.setattr(there._client, "search", gone)
    with pytest.raises(NoAnswerError, match=r"gave no answer \(the server is down\)"):
        there.search(query_rows(1), 3)

    class Refused(grpc.RpcError):  # type: ignore[misc]
        def __init__(self, status: Any, details: str) -> None:
            self.code, self.details = lambda: status, lambda: details

    unauthenticated = Refused(grpc.StatusCode.UNAUTHENTICATED, "auth check failure, please check api key is correct")
    connecting = MilvusException(code=2, message="Fail connecting to server, illegal connection params or server unavailable")
    connecting.__cause__ = unauthenticated
    for error, kind, message in (
        (
            MilvusException(code=1100, message="failed to create query plan:\ncannot parse"),
            BackendError,
            r"refused \(failed to.*: cannot parse",
        ),
        (unauthenticated, BackendError, r"refused \(UNAUTHENTICATED: auth check failure, please"),
        (connecting, BackendError, r"refused \(UNAUTHENTICATED: auth check failure, please"),
        (Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), NoAnswerError, "no answer within 30 s; check"),
    ):

        def fail(*arguments: Any, error: Exception = error, **options: Any) -> Any:
            raise error

        monkeypatch.setattr(there._client, "search", fail)
        with pytest.raises(BackendError, match=message) as caught:
            there.search(query_rows(1), 3)
        assert type(caught.value) is kind
    there.close()
    with pytest.raises(InputError, match="closed"):
        there.search(query_rows(1), 3)


def test_more_than_one_answer_of_milvus_may_hold_is_refused(
    there: MilvusIndex, saved: GalleryIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not cut short in silence; but all there is, where a filter passes fewer."""
    monkeypatch.setattr(milvus_search, "_MOST_BYTES", 50 * 2 * 4 * 4)
    queries = query_rows(2)
    assert [len(one.matches) for one in there.search(queries, 50)] == [50, 50]
    for k, exclude, message in (
        (51, None, "k=51 and 0 excluded ids: one search fetches at most 50 of 600 items"),
        (50, [[], list(saved.ids)[:300]], "k=50 and 300 excluded ids"),
    ):
        with pytest.raises(InputError, match=message):
            there.search(queries, k, exclude=exclude)
    few = {"n": {"<": 20}}
    assert there.search(queries, 60, filter=few) == saved.search(queries, 60, filter=few)


def test_what_is_refused(there: MilvusIndex, make_index: MakeIndex, tmp_path: Path) -> None:
    for options, message in (
        ({"zones": ZoneSpec(lo=0, hi=1), "filter": {"n": 1}}, "zones with a filter"),
        ({"zones": ZoneSpec(lo=0, hi=1, policy="softmax"), "picks": 1}, "random draws depend on rows"),
        ({"filter": {"n": {"like": 1}}}, "unknown operator"),
    ):
        with pytest.raises(InputError, match=message):
            there.search(query_rows(1), 3, **options)
    other = make_index()
    other.save(tmp_path / "empty")
    with pytest.raises(InputError, match="an empty index"):
        MilvusIndex.create(str(tmp_path / "milvus.db"), "empty", other)
    other.add(["a"], target_rows(1), metadata=[{"text": "x" * 70_000}])
    other.save(tmp_path / "large")
    with pytest.raises(InputError, match="'a': its id or metadata takes more than the 65535 bytes"):
        MilvusIndex.create(str(tmp_path / "milvus.db"), "large", other)
    with pytest.raises(IndexFormatError, match="was made with model"):
        there.require_model("x" * 32)


def test_the_engine_searches_milvus(engine: RetrievalEngine, bundle_path: Path, image_folder: Path, tmp_path: Path) -> None:
    engine.index_images(image_folder, metadata={f"{n:02}.png": {"even": True} for n in range(0, 12, 2)})
    engine.save_index(tmp_path / "index")
    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as other:
        other.attach(MilvusIndex.create(str(tmp_path / "milvus.db"), "tiny", engine.index))
        for query in (
            Query(reference_id="02.png", k=4, zones=True, explain=True),
            Query(text="in red", unlike=["04.png"], exclude=["06.png"], offset=1, k=20),
            Query(image=image_folder / "00.png", text="dots", filter={"even": True}, k=5),
        ):
            found, single = other.search(query), engine.search(query)
            assert (found.hits, found.zones, found.exact) == (single.hits, single.zones, True)
        assert other.searched.snapshot() == other.searched.snapshot(), "so that a batcher's queries are searched together"
        with pytest.raises(InputError, match="pass its image instead"):
            other.search(Query(reference_id="02.png", text="in red"))
        with pytest.raises(InputError, match="'x' is not an id of the index"):
            other.search(Query(reference_id="x"))


VALUES = st.one_of(
    st.sampled_from(["a", "b", 'q"', 1, 1.0, 2, -3, True, False, None, 2**60, 2**70, 0.5]),
    st.lists(st.sampled_from(["a", 1, 1.0, 38.0, 0.5, True]), max_size=2),
)
SCALARS = st.sampled_from(["a", "b", 'q"', 1, 1.0, 2, True, False, None, 2**60, 2**70, 0.5])
CONDITIONS = st.one_of(
    SCALARS,
    st.tuples(st.sampled_from(["!=", "contains"]), SCALARS).map(lambda pair: {pair[0]: pair[1]}),
    st.tuples(st.sampled_from(["<", "<=", ">", ">="]), st.sampled_from(["a", 1, 0.5, 2**60])).map(lambda pair: {pair[0]: pair[1]}),
    st.lists(SCALARS, max_size=3).map(lambda values: {"in": values}),
    st.booleans().map(lambda there: {"exists": there}),
)
FLAT = st.dictionaries(st.sampled_from(["x", "y"]), CONDITIONS, min_size=1, max_size=2)
NESTED = st.one_of(
    FLAT, st.tuples(st.sampled_from(["and", "or", "not"]), st.lists(FLAT, min_size=1, max_size=3)).map(lambda pair: {pair[0]: pair[1]})
)


@pytest.mark.parametrize("filter", [{"x": {"contains": 38}}, {"x": 38}, {"x": {"in": [38, 7]}}, {"x": {">=": 38}}])
def test_numbers_are_written_as_floats(filter: dict[str, Any]) -> None:
    """A server's `json_contains` does not find 38.0 when it is asked for 38; Milvus Lite does."""
    text, whole = expression_of(compile_filter(filter))
    assert whole
    assert "38.0" in text


def test_an_expression_passes_whatever_the_filter_passes(make_index: MakeIndex, tmp_path: Path) -> None:
    """Random filters over random metadata: Milvus returns no fewer items, and the search those of the single index."""
    drawn: list[dict[str, Any]] = []

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.dictionaries(st.sampled_from(["x", "y"]), VALUES))
    def draw(metadata: dict[str, Any]) -> None:
        drawn.append(metadata)

    draw()
    index = make_index()
    index.add([f"i{n}" for n in range(len(drawn))], target_rows(len(drawn)), metadata=drawn)
    index.save(tmp_path / "index")
    with MilvusIndex.create(str(tmp_path / "milvus.db"), "random", index) as there:

        @settings(max_examples=120, deadline=None, derandomize=True)
        @given(NESTED)
        def check(filter: dict[str, Any]) -> None:
            expression, _ = expression_of(compile_filter(filter))
            passing = {item.id for item in index.snapshot().items(filter)}
            asked = there._client.query("random", filter=expression, output_fields=["id"], limit=1000)
            assert passing <= {one["id"] for one in asked}, (filter, expression)
            found: tuple[IndexMatches, ...] = there.search(query_rows(1), 100, filter=filter)
            assert found == index.search(query_rows(1), 100, filter=filter)

        check()
