"""Sharded serving on a local Ray cluster: the single index's answers, losses, and actors that come back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import query_rows, target_rows

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, InputError
from dqe_engine.index import GalleryIndex
from dqe_engine.index.on_ray_shards import RayTransport, open_on_ray, stop
from dqe_engine.index.shard_files import cut_index
from dqe_engine.index.sharded import ShardedIndex
from dqe_engine.query import Query

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

MakeIndex = Callable[..., GalleryIndex]


def transport_of(index: ShardedIndex) -> RayTransport:
    transport = index._transport
    assert isinstance(transport, RayTransport)
    return transport


def kill(index: ShardedIndex, slot: int, *, for_good: bool) -> None:
    import ray

    ray.kill(transport_of(index).actor(slot), no_restart=for_good)


def answered(index: ShardedIndex, *arguments: Any, **options: Any) -> Any:
    """What the index says once no shard is lost any more; Ray takes a moment to start an actor again."""
    until = time.monotonic() + 60
    while True:
        try:
            found = index.search(*arguments, **options)
            if not found[0].lost:
                return found
        except BackendError:
            pass
        if time.monotonic() > until:
            pytest.fail("the shard did not come back")
        time.sleep(0.05)


def test_two_shards_say_what_the_single_index_says_and_come_back(make_index: MakeIndex, tmp_path: Path) -> None:
    single = make_index()
    rows = np.concatenate([target_rows(40), target_rows(40)])  # each twice: ties between the shards
    single.add([f"i{n}" for n in range(80)], rows, metadata=[{"n": n} for n in range(80)])
    single.save(tmp_path / "whole")
    cut = cut_index(single, tmp_path / "cut", 2)
    queries, spec = query_rows(3), ZoneSpec(lo=0.1, hi=0.5, policy="hardest")
    options: dict[str, Any] = {"filter": {"n": {"<": 70}}, "exclude": [["i3"], [], ["i60", "x"]], "zones": spec, "picks": 7}
    with open_on_ray(tmp_path / "cut", on_loss="partial", timeout=60) as sharded:
        assert sharded.search(queries, 9, **options) == single.search(queries, 9, **options)
        assert sharded.search(queries, 200) == single.search(queries, 200)
        assert sharded.count({"n": {">": 50}}) == 29
        assert [item.metadata for item in sharded.get(["i70", "i3"])] == [{"n": 70}, {"n": 3}]
        with pytest.raises(InputError, match="unknown operator"):
            sharded.search(queries, 9, filter={"n": {"like": 1}})

        single.remove(["i39"])
        single.add(["new"], target_rows(1, 7))
        single.save(tmp_path / "whole")
        cut_index(single, tmp_path / "cut", 2)
        assert sharded.refresh()
        assert sharded.search(queries, 200) == single.search(queries, 200)

        kill(sharded, 1, for_good=False)  # as a crash: Ray starts it again, and it opens what it had
        assert answered(sharded, queries, 9, **options) == single.search(queries, 9, **options)
        kill(sharded, 1, for_good=True)
        lost = sharded.search(queries, 9)
        assert {(one.exact, one.lost) for one in lost} == {(False, (cut.shards[1].name,))}
        half = [f"i{n}" for n in range(40)]
        assert {match.id for one in lost for match in one.matches} <= set(half)
        assert answered(sharded, queries, 9, **options) == single.search(queries, 9, **options), "another was started in its place"


def test_an_engine_over_shared_actors(engine: RetrievalEngine, bundle_path: Path, image_folder: Path, tmp_path: Path) -> None:
    engine.index_images(image_folder)
    engine.save_index(tmp_path / "whole")
    cut_index(engine.index, tmp_path / "cut", 2)
    other = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    query = Query(reference_id="02.png", text="in red", k=5, offset=1, zones=True, explain=True, unlike=["04.png"])
    expected = engine.search(query)
    for _ in range(2):  # the second finds the actors of the first
        other.attach(open_on_ray(tmp_path / "cut", name="shop", timeout=60))
        found = other.search(query)
        assert (found.hits, found.zones, found.exact) == (expected.hits, expected.zones, True)
        other.close()
    assert stop("shop") == 2
    assert stop("shop") == 0
    asked = engine.encode_queries([query]).queries
    with open_on_ray(tmp_path / "cut", timeout=1e-6) as impatient, pytest.raises(BackendError, match="nothing came within 1e-06 s"):
        impatient.search(asked, 3)
    broken = open_on_ray(tmp_path / "cut", timeout=60)
    kill(broken, 0, for_good=True)
    with pytest.raises(BackendError, match=r"^shard \w+-000 of 2 gave no answer, so the search has no answer \(ActorDiedError: "):
        broken.search(asked, 3)
