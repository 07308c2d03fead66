"""A Milvus that is there and says nothing: every call ends with one line, in time, and a server's next callers do not wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from support.samples import query_rows, target_rows
from support.stalling import Stalling

from dqe_engine.errors import NoAnswerError
from dqe_engine.index import GalleryIndex
from dqe_engine.index.milvus import MilvusIndex
from dqe_engine.index.milvus_calls import MilvusCalls
from dqe_engine.index.transports import MOST_LATE

pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'dqe-engine[milvus]'")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install 'dqe-engine[milvus]'")

MakeIndex = Callable[..., GalleryIndex]
LATE = r"^Milvus at http://127.0.0.1:\d+ gave no answer within 0.2 s; check that it runs, or allow more time \(timeout\), then ask again$"


@pytest.fixture
def index(make_index: MakeIndex, tmp_path: Path) -> GalleryIndex:
    made = make_index()
    made.add([f"i{n}" for n in range(30)], target_rows(30))
    made.save(tmp_path / "index")
    return made


@pytest.fixture
def way(index: GalleryIndex, tmp_path: Path) -> Iterator[Stalling]:
    """To a Milvus that has the index as the collection `garments`."""
    from milvus_lite.server_manager import server_manager_instance

    MilvusIndex.create(str(tmp_path / "milvus.db"), "garments", index).close()
    port = int(str(server_manager_instance.start_and_get_uri(str(tmp_path / "milvus.db"))).rpartition(":")[2])
    with Stalling(port) as way:
        yield way
    server_manager_instance.release_all()


def opened(way: Stalling, **options: Any) -> MilvusIndex:
    """With patience for a busy machine; impatient from then on."""
    there = MilvusIndex(way.address, "garments", timeout=60, **options)
    there.search(query_rows(1), 3)
    there._timeout = there._calls.timeout = 0.2
    return there


def ended(call: Callable[[], Any]) -> Any:
    """What the call gives, however long it would hang."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(60)


@pytest.mark.parametrize("cut", [False, True])
def test_every_call_has_a_deadline(way: Stalling, index: GalleryIndex, cut: bool) -> None:
    """Also those for which the client has none, and while it connects again."""
    there = opened(way)
    queries = query_rows(1)
    way.flowing.clear()
    if cut:
        way.cut()
    for call in (
        lambda: there.search(queries, 3),
        lambda: there.snapshot().find(["i1"]),
        lambda: there.snapshot().tokens_of(["i1"]),
        lambda: "i1" in there,
        there.count,
        there._is_flat,
        lambda: there.sync(index),
        lambda: MilvusIndex(way.address, "garments", timeout=0.2),
        lambda: MilvusIndex.create(way.address, "other", index, timeout=0.2, replace=True),
    ):
        with pytest.raises(NoAnswerError, match=LATE):
            ended(call)
    health = ended(there.look)
    assert (health.lost, health.answers) == (("garments",), False)
    assert health.reasons[0].startswith(f"Milvus at {way.address} gave no answer within 0.2 s")
    way.flowing.set()
    with MilvusIndex(way.address, "garments", timeout=60) as again:
        assert again.search(queries, 3)[0].matches == index.search(queries, 3)[0].matches
    ended(there.close)


def test_one_that_was_late_is_spared_until_a_look_is_answered(way: Stalling, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    ask = MilvusCalls.ask

    def asked(self: MilvusCalls, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        begun.append(question.__name__)
        return ask(self, question, *arguments, **options)

    there = opened(way, spare=True)
    monkeypatch.setattr(MilvusCalls, "ask", asked)
    way.flowing.clear()
    with pytest.raises(NoAnswerError, match=LATE):
        ended(lambda: there.snapshot().find(["i1"]))
    for _ in range(3):
        with pytest.raises(NoAnswerError, match=r"gave no answer \(it was late \(more than 0.2 s\), and it is not waited for until"):
            there.snapshot().find(["i1"])
    assert begun == ["query"], "nobody asked again"
    assert not ended(there.look).answers
    assert begun == ["query", "_nearest"], "a count may be answered where searches hang"
    way.flowing.set()
    there._timeout = there._calls.timeout = 60
    assert ended(there.look).answers
    (item,) = there.snapshot().find(["i1"])
    assert item is not None
    assert item.id == "i1"
    there.close()


def test_calls_that_hang_do_not_pile_up() -> None:
    gate, begun = threading.Event(), list[int]()

    def hang() -> None:
        begun.append(1)
        assert gate.wait(60)

    calls = MilvusCalls("http://there", 0.02)
    for _ in range(MOST_LATE + 3):
        with pytest.raises(NoAnswerError, match=r"^Milvus at http://there gave no answer within 0.02 s; check"):
            calls(hang)
    assert len(begun) == MOST_LATE
    gate.set()
    while calls._late:
        calls._late = [one for one in calls._late if not one.done()]
    assert calls(lambda: 7) == 7
    calls.close()
