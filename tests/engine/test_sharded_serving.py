"""How shards are served: what hangs, what is cancelled, who shares an actor, what a server holds, and in which order shards are."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.samples import query_rows, target_rows

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import NoAnswerError
from dqe_engine.index import GalleryIndex, on_ray_shards, shard_server
from dqe_engine.index.shard_files import cut_index, join_indexes
from dqe_engine.index.shard_server import ShardServer
from dqe_engine.index.sharded import ShardedIndex
from dqe_engine.index.transports import HereTransport, Lost
from dqe_engine.processors import give_way, niceness_here
from dqe_engine.query import Query

MakeIndex = Callable[..., GalleryIndex]


class FakeRay:
    """Actors that never answer."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.cancelled: list[Any] = []
        self.names: list[str] = []

    def remote(self, **options: Any) -> Any:
        return lambda of: self

    def options(self, **options: Any) -> FakeActor:
        self.names.append(options.get("name", ""))
        return FakeActor(self)

    def wait(self, asked: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return asked[:1], asked[1:]

    def get(self, one: Any) -> Any:
        return "answer", one

    def cancel(self, one: Any) -> None:
        self.cancelled.append(one)


class FakeActor:
    def __init__(self, ray: FakeRay) -> None:
        self._ray, self.call = ray, self

    def remote(self, *arguments: Any, **keywords: Any) -> Any:
        if not keywords:
            self._ray.asked.append(arguments)
            return arguments
        return self


def test_calls_that_came_too_late_are_cancelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else they would wait in the actor, and the searches of the next callers behind them."""
    ray = FakeRay()
    monkeypatch.setattr(on_ray_shards, "connect", lambda asked_by: ray)
    transport = on_ray_shards.RayTransport(tmp_path, "m" * 32, name=None, cpus=1, concurrency=1, threads=1)
    replies: list[Any] = transport.ask([(0, ("rows", "a", "1")), (1, ("rows", "b", "2"))], 0.5)
    assert replies[0] == ("answer", ("rows", "a", "1"))
    assert isinstance(replies[1], Lost)
    assert ray.cancelled == [("rows", "b", "2")]


def test_actors_are_shared_by_those_who_want_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ray = FakeRay()
    monkeypatch.setattr(on_ray_shards, "connect", lambda asked_by: ray)
    same: dict[str, Any] = {"name": "shop", "cpus": 1, "concurrency": 4, "threads": 1, "screened": None, "mapped": True}
    others = [{}, {}, {"threads": 2}, {"screened": True}, {"mapped": False}, {"concurrency": 5}]
    for other in others:
        on_ray_shards.RayTransport(tmp_path, "m" * 32, **(same | other)).actor(0)
    assert ray.names[0] == ray.names[1]
    assert len(set(ray.names)) == len(others) - 1
    assert {name.rsplit("-", 2)[0] for name in ray.names} == {"shop"}, "what `stop` looks for"


def test_a_shard_in_this_process_that_hangs_is_not_waited_for(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = make_index(8)
    single.save(tmp_path / "whole")
    cut_index(single, tmp_path / "cut", 2)
    gate, call = threading.Event(), ShardServer.call

    def hang(self: ShardServer, method: str, *arguments: Any) -> Any:
        assert method != "search" or gate.wait(30)
        return call(self, method, *arguments)

    monkeypatch.setattr(ShardServer, "call", hang)
    with ShardedIndex.open_here(tmp_path / "cut", timeout=0.05) as sharded:
        with pytest.raises(NoAnswerError, match=r"\(nothing came within 0.05 s\); look at the machine"):
            sharded.search(query_rows(1), 3)
        gate.set()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_threads_that_search_shards_are_as_nice_whoever_starts_them(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(8)
    index.save(tmp_path / "whole")
    shard = cut_index(index, tmp_path / "cut", 1).shards[0]
    found: list[int] = []

    class Watched(ShardServer):
        def call(self, *arguments: Any) -> Any:
            found.append(niceness_here())
            return super().call(*arguments)

    for nice_already in (0, 3):
        transport = HereTransport(tmp_path / "cut", "m" * 32, niceness=3)
        transport._make = lambda: Watched(str(tmp_path / "cut"), "m" * 32)  # type: ignore[assignment]

        def ask(nice: int = nice_already, transport: HereTransport = transport) -> None:
            give_way(nice)
            transport.ask([(0, ("warm", shard.name, shard.revision))], 60)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        transport.close()
    assert found == [niceness_here() + 3] * 2


def test_a_loop_is_not_kept_by_a_shard(engine: RetrievalEngine, bundle_path: Path, image_folder: Path, tmp_path: Path) -> None:
    """A small query whose items shards have to be asked for is prepared by a reader."""
    engine.index_images(image_folder)
    engine.save_index(tmp_path / "whole")
    cut_index(engine.index, tmp_path / "cut", 2)
    asking: list[int] = []

    class Watched(HereTransport):
        def ask(self, calls: Sequence[tuple[int, tuple[Any, ...]]], timeout: float) -> list[Any]:
            asking.append(threading.get_ident())
            return list(super().ask(calls, timeout))

    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as other:
        other.attach(ShardedIndex(tmp_path / "cut", Watched(tmp_path / "cut", engine.bundle.model_hash)))
        asking.clear()
        with other.batcher() as batcher:
            query = Query(reference_id="02.png", k=3)
            assert asyncio.run(batcher.search_async(query, timeout=60)).hits == engine.search(query).hits
    assert asking
    assert threading.get_ident() not in asking


def saved_shards(make_index: MakeIndex, folder: Path, *names: str) -> dict[str, str]:
    """Revisions of shards of 8 items, by name."""
    revisions = {}
    for name in names:
        index = make_index(8)
        index.save(folder / name)
        revisions[name] = str(index.snapshot().revision)
    return revisions


def test_a_server_holds_two_shards_at_most(make_index: MakeIndex, tmp_path: Path) -> None:
    """Old states of a folder are kept for searches that still run; those of a folder that was replaced would be a shard more each time."""
    revisions = saved_shards(make_index, tmp_path, "a", "b", "c")
    server = ShardServer(str(tmp_path), "m" * 32)
    snapshots: dict[str, weakref.ref[Any]] = {}
    for name, held in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc"), ("a", "ab")):
        assert server.call("warm", name, revisions[name]) == ("answer", 8)
        snapshots[name] = weakref.ref(server._state(name, revisions[name]))
        gc.collect()
        assert sorted(name for name, one in snapshots.items() if one() is not None) == sorted(held), name
    assert server.call("warm", "a", "other")[0] == "lost"
    assert server.call("warm", "a", revisions["a"]) == ("answer", 8)


def test_a_shard_that_was_replaced_answers_until_nobody_asks_for_it(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not loaded again for the searches of those who have not moved on, and is let go of after them."""
    revisions = saved_shards(make_index, tmp_path, "old", "new")
    loaded, load, gate, began = list[str](), GalleryIndex.load, threading.Event(), threading.Event()

    def slow(path: Path, **options: Any) -> GalleryIndex:
        loaded.append(path.name)
        if path.name == "new":
            began.set()
            assert gate.wait(60)
        return load(path, **options)

    monkeypatch.setattr(GalleryIndex, "load", slow)
    server = ShardServer(str(tmp_path), "m" * 32)
    server.call("open", "old", revisions["old"])
    opening = threading.Thread(target=server.call, args=("open", "new", revisions["new"]))
    opening.start()
    assert began.wait(60)
    assert server.call("warm", "old", revisions["old"]) == ("answer", 8), "while the new one is being opened"
    gate.set()
    opening.join()
    for _ in range(3):
        for name in ("old", "new"):
            assert server.call("warm", name, revisions[name]) == ("answer", 8)
    assert loaded == ["old", "new"], "no turns are taken"
    assert [*server._folders] == ["old", "new"]
    monkeypatch.setattr(shard_server, "KEPT_SECONDS", 0.0)
    server.call("warm", "new", revisions["new"])
    assert [*server._folders] == ["new"]


def test_a_search_that_spans_a_cut_sees_one_state(make_index: MakeIndex, tmp_path: Path) -> None:
    """Its second round, for zones, comes after the refresh that its first was before."""
    index = make_index(40)
    index.save(tmp_path / "whole")
    cut_index(index, tmp_path / "cut", 2)
    queries, options = query_rows(2), {"zones": ZoneSpec(lo=0.1, hi=0.5)}
    rounds: list[Any] = []

    class Switching(HereTransport):
        def ask(self, calls: Sequence[tuple[int, tuple[Any, ...]]], timeout: float) -> list[Any]:
            if calls[0][1][0] == "search":
                rounds.append(calls[0][1][1])
                if len(rounds) == 2:
                    index.remove([match.id for match in before[0].matches])
                    index.save(tmp_path / "whole")
                    cut_index(index, tmp_path / "cut", 3, anew=True)
                    assert sharded.refresh()
            return list(super().ask(calls, timeout))

    before = index.search(queries, 5, **options)
    with ShardedIndex(tmp_path / "cut", Switching(tmp_path / "cut", "m" * 32)) as sharded:
        assert sharded.search(queries, 5, **options) == before
        assert rounds == [rounds[0]] * 2
        assert sharded.search(queries, 5, **options) == index.search(queries, 5, **options) != before


def test_shards_that_were_joined_keep_their_order(make_index: MakeIndex, tmp_path: Path) -> None:
    def add(name: str) -> None:
        index = make_index()
        index.add([name], target_rows(1))
        index.save(tmp_path / name)

    def names() -> list[str]:
        return [shard.name for shard in join_indexes(tmp_path).shards]

    for name in ("part-10", "part-9", "part-2"):
        add(name)
    assert names() == ["part-2", "part-9", "part-10"]
    for name in ("part-11", "b", "part-1", "part-01"):
        add(name)
    order = ["part-2", "part-9", "part-10", "b", "part-01", "part-1", "part-11"]
    assert names() == order
    assert [shard.name for shard in join_indexes(tmp_path, order[::-1]).shards] == order[::-1]
    assert names() == order[::-1]
