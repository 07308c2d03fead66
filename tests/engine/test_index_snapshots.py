"""Snapshots, readers in other processes, and what an index tells of itself, held against a plain dictionary."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.samples import image_rows, query_rows, target_rows

from dqe_engine.errors import IndexConflictError, IndexFormatError, InputError
from dqe_engine.index import GalleryIndex, Snapshot
from dqe_engine.index import storage as disk
from dqe_engine.index import writer as writing

MakeIndex = Callable[..., GalleryIndex]
QUERIES = query_rows(2)


class Kept(NamedTuple):
    """What one item is: the seed of its tokens, and its metadata."""

    seed: int
    metadata: dict[str, Any] | None


def check(found: Snapshot, expected: dict[str, Kept]) -> None:
    """Everything that can be asked of a snapshot."""
    ids = list(expected)
    assert list(found.ids()) == ids
    assert [(item.id, item.metadata) for item in found.items()] == [(id, kept.metadata) for id, kept in expected.items()]
    targets = np.concatenate([target_rows(1, kept.seed) for kept in expected.values()] or [target_rows(0)])
    for low in (None, 0, 3):
        passing = [i for i, kept in enumerate(expected.values()) if low is None or (kept.metadata or {}).get("n", -1) >= low]
        filter = None if low is None else {"n": {">=": low}}
        assert found.count_of(filter) == len(passing)
        excluded = set(ids[:2])
        scores = np.einsum("bd,nmd->bnm", QUERIES, targets[passing]).max(axis=2) if passing else np.zeros((2, 0))
        for b, result in enumerate(found.search(QUERIES, 1000, exclude=[excluded, ["absent"]], filter=filter)):
            left = [(n, i) for n, i in enumerate(passing) if b or ids[i] not in excluded]
            assert {match.id for match in result.matches} == {ids[i] for _, i in left}
            assert len(result.matches) == len(left)
            by_id = {match.id: match for match in result.matches}
            for n, i in left:
                assert abs(by_id[ids[i]].score - scores[b, n]) < 1e-5
                assert by_id[ids[i]].metadata == expected[ids[i]].metadata
    for id in ids[:3] + ids[-3:]:
        row = found.existing(id)
        np.testing.assert_array_equal(found.target_tokens(row), target_rows(1, expected[id].seed)[0])
        np.testing.assert_array_equal(found.image_tokens(row), image_rows(1, expected[id].seed)[0].astype(np.float16))


@pytest.mark.parametrize("seed", range(6))
def test_snapshots_keep_what_they_saw(make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Adding, replacing, removing, other metadata, saving, compacting and following, at random; a reader follows the saves."""
    monkeypatch.setattr(writing, "COMPACTED_ROWS", 8)
    rng, path = random.Random(seed), tmp_path / "index"
    index, now, seeds = make_index(image_storage="f16", screened=rng.choice([True, False])), dict[str, Kept](), 0
    taken: list[tuple[Snapshot, dict[str, Kept]]] = []
    reader: GalleryIndex | None = None
    saved: dict[str, Kept] = {}
    for _ in range(120):
        action = rng.choices(("add", "remove", "metadata", "save", "compact", "snapshot"), (8, 4, 3, 3, 1, 3))[0]
        if action == "add":
            ids = rng.sample([f"i{n}" for n in range(20)], rng.randint(0, 4))
            kept = [Kept(seeds + n, rng.choice([None, {"n": rng.randint(0, 5)}])) for n in range(len(ids))]
            seeds += len(ids)
            index.add(
                ids, np.concatenate([target_rows(1, k.seed) for k in kept] or [target_rows(0)]),
                np.concatenate([image_rows(1, k.seed) for k in kept] or [image_rows(0)]), [k.metadata for k in kept], replace=True,
            )  # fmt: skip
            now = {id: k for id, k in now.items() if id not in ids} | dict(zip(ids, kept, strict=True))
        elif action == "remove":
            ids = rng.sample(list(now), min(len(now), rng.randint(0, 3)))
            index.remove(ids)
            now = {id: k for id, k in now.items() if id not in ids}
        elif action == "metadata":
            ids = rng.sample(list(now), min(len(now), 2))
            changed = {id: Kept(now[id].seed, {"n": rng.randint(0, 5)}) for id in ids}
            index.update_metadata({id: k.metadata for id, k in changed.items()})
            now = {id: k for id, k in now.items() if id not in ids} | changed
        elif action == "snapshot":
            taken.append((index.snapshot(), dict(now)))
        else:
            if action == "save" or index.stats().path is None:
                index.save(path)
            else:
                index.compact()
                assert index.stats().removed == 0
            saved = dict(now)
            if reader is None:
                reader = GalleryIndex.load(path, mapped=rng.choice([True, False]))
            before = reader.snapshot(), len(reader)
            assert reader.refresh() == (reader.stats().revision == index.stats().revision and before[0] is not reader.snapshot())
            check(reader.snapshot(), saved)
            taken.append((reader.snapshot(), saved))
    assert len(index) == len(now)
    check(index.snapshot(), now)
    for snapshot, expected in rng.sample(taken, min(len(taken), 12)):
        check(snapshot, expected)
    if reader is not None:
        check(GalleryIndex.load(path, verify=True).snapshot(), saved)
        reader.verify()


def test_an_index_in_memory_does_not_grow_with_what_is_gone(make_index: MakeIndex) -> None:
    index = make_index(100)
    for n in range(3000):
        index.add(["again"], target_rows(1, n), replace=True)
    assert index.stats().removed <= writing.COMPACTED_ROWS
    assert len(index) == 101
    assert index.stats().unsaved <= 2 * writing.COMPACTED_ROWS + 202


def test_a_saved_index_does_not_grow_with_what_is_gone_either(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(100, image_storage="f16")
    index.remove(["i99"])
    index.save(tmp_path / "index")
    index.remove(["i1"])
    for n in range(3000):
        index.add(["again", "i2"], target_rows(2, n), image_rows(2, n), replace=True)
    stats = index.stats()
    assert (stats.items, stats.path) == (99, str(tmp_path / "index"))
    assert stats.removed <= writing.COMPACTED_ROWS + 8
    assert stats.unsaved <= 2 * writing.COMPACTED_ROWS + 16
    index.save(tmp_path / "index")
    loaded = GalleryIndex.load(tmp_path / "index", verify=True)
    assert loaded.ids == index.ids
    for id in ("i0", "i2", "again"):
        np.testing.assert_array_equal(loaded.target_tokens(id), index.target_tokens(id))
        np.testing.assert_array_equal(loaded.image_tokens(id), index.image_tokens(id))
    np.testing.assert_array_equal(loaded.target_tokens("i2"), target_rows(2, 2999)[1])
    assert loaded.search(QUERIES, 200) == index.search(QUERIES, 200)


def test_following(make_index: MakeIndex, tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = make_index(5)
    with pytest.raises(InputError, match="never saved or loaded, so there is nothing to follow"):
        index.refresh()
    index.save(path)
    reader = GalleryIndex.load(path)
    assert not reader.refresh()
    index.add(["new"], target_rows(1))
    index.save(path)
    reader.add(["mine"], target_rows(1))
    with pytest.raises(IndexConflictError, match="changed by another writer, and 1 changes here are unsaved"):
        reader.refresh()
    reader = GalleryIndex.load(path)
    other = make_index(2)
    other.model_hash = "n" * 32
    other._writer.layout = type(other._writer.layout)("n" * 32, *[getattr(other._writer.layout, name) for name in (
        "target_shape", "image_shape", "storage", "image_storage")])  # fmt: skip
    other.save(path, overwrite=True)
    with pytest.raises(IndexFormatError, match="made with model nnnnnnnnnnnn, this bundle is mmmmmmmmmmmm"):
        reader.refresh()
    assert reader.ids == ("i0", "i1", "i2", "i3", "i4", "new")
    (path / "manifest.json").unlink()
    with pytest.raises(IndexFormatError, match="the index is gone"):
        reader.refresh()


def test_publishing_over_a_served_index(make_index: MakeIndex, tmp_path: Path) -> None:
    """A catalogue made elsewhere takes the place of one that is being read: readers go on, and follow."""
    served = tmp_path / "served"
    make_index(30).save(served)
    reader = GalleryIndex.load(served)
    before = reader.snapshot()
    expected = before.search(QUERIES, 5)
    new = make_index()
    new.add(["a", "b"], target_rows(2, 7))
    new.save(tmp_path / "new")
    GalleryIndex.load(tmp_path / "new").save(served, overwrite=True)
    assert before.search(QUERIES, 5) == reader.search(QUERIES, 5) == expected
    assert reader.refresh()
    assert reader.ids == ("a", "b")
    assert before.search(QUERIES, 5) == expected


def test_what_an_index_tells_of_itself(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(4, image_storage="f16")
    assert repr(index) == "<GalleryIndex in memory: 4 items, targets f32, images f16, 4 changes unsaved>"
    index.save(tmp_path / "index")
    index.remove(["i0"])
    assert repr(index) == f"<GalleryIndex of {tmp_path / 'index'}: 3 items, targets f32, images f16, 1 changes unsaved>"
    index.search(QUERIES, 1)
    stats = index.stats()
    assert (stats.items, stats.removed, stats.unsaved, stats.path) == (3, 1, 1, str(tmp_path / "index"))
    assert (stats.target_bytes, stats.image_bytes) == (4 * 2 * 4 * 4, 4 * 3 * 5 * 2)
    assert stats.screen_bytes == 4 * 2 * (64 + 12)
    assert [item.id for item in index] == [item.id for item in index.get(["i1", "i2", "i3"])] == ["i1", "i2", "i3"]
    with pytest.raises(InputError, match="2 ids are not in the index: 'i0', 'x'"):
        index.get(["i0", "i1", "x"])
    with pytest.raises(InputError, match="1 ids are not in the index: 'i0'"):
        index.update_metadata({"i1": None, "i0": {}})


def test_metadata_of_ids_that_are_subclasses_of_str(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(2)
    index.update_metadata({np.str_("i1"): {"n": 1}})
    index.save(tmp_path / "index")
    assert GalleryIndex.load(tmp_path / "index").get(["i1"])[0].metadata == {"n": 1}


def test_a_closed_index(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(4)
    index.save(tmp_path / "index")
    with GalleryIndex.load(tmp_path / "index") as loaded:
        snapshot = loaded.snapshot()
    loaded.close()
    assert len(snapshot.search(QUERIES, 9)[0].matches) == 4
    calls: list[Callable[[], object]] = [
        lambda: loaded.search(QUERIES, 1), lambda: loaded.ids, lambda: loaded.add(["a"], target_rows(1)), lambda: loaded.remove(["i0"]),
        lambda: loaded.save(tmp_path / "index"), loaded.compact, loaded.refresh, lambda: loaded.target_tokens("i0"), loaded.stats,
        lambda: loaded.get([]), loaded.count, lambda: list(loaded), lambda: loaded.update_metadata({}),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match="this index is closed; load it again"):
            call()
    assert GalleryIndex.load(tmp_path / "index").ids == index.ids


def test_threads_search_while_one_writes(make_index: MakeIndex, tmp_path: Path) -> None:
    """Every answer is that of one moment: the index always holds a block of ten items that came together."""
    index, stop, failures = make_index(), threading.Event(), list[str]()

    def add_block(n: int) -> None:
        index.add([f"b{n}-{i}" for i in range(10)], target_rows(10, n), metadata=[{"block": n}] * 10)

    add_block(0)

    def search() -> None:
        while not stop.is_set():
            blocks = [(match.metadata or {})["block"] for match in index.search(QUERIES, 100)[0].matches]
            if len(set(blocks)) > 2 or any(blocks.count(block) != 10 for block in blocks):
                failures.append(f"{blocks}")
            snapshot = index.snapshot()
            if len(snapshot.ids()) != snapshot.count or snapshot.count % 10:
                failures.append(f"{snapshot.ids()}")

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(1, 120):
        add_block(n)
        index.remove([f"b{n - 1}-{i}" for i in range(10)])
        if n % 7 == 0:
            index.save(tmp_path / "index")
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_sixteen_threads(make_index: MakeIndex, tmp_path: Path) -> None:
    """Searching, adding, replacing, removing, saving, compacting and following at once: every answer is a state that there was, and none
    is older than the one before it. An item of each state says which it is."""
    seconds, size = float(os.environ.get("DQE_THREAD_SECONDS", "2")), 10
    index, path, failures, answers = make_index(), tmp_path / "index", list[str](), [0] * 16
    states: list[frozenset[int]] = []  # the blocks of ten items that each state has; said before it is made
    changing, until = threading.Lock(), time.monotonic() + seconds

    def put(block: int, *, instead: int | None = None) -> None:
        slot = block if instead is None else slots.pop(instead)
        slots[block] = slot
        states.append(frozenset(slots))
        index.add([f"s{slot}-{i}" for i in range(size)], target_rows(size, block), metadata=[{"block": block}] * size, replace=True)

    slots: dict[int, int] = {}
    put(0)
    index.save(path)
    reader = GalleryIndex.load(path)

    def change(rng: random.Random) -> None:
        with changing:
            action, block = rng.choice(("add", "replace", "remove")), len(states)
            if action == "add" and len(slots) < 6:
                put(block)
            elif action == "remove" and len(slots) > 1:
                slot = slots.pop(rng.choice(list(slots)))
                states.append(frozenset(slots))
                index.remove([f"s{slot}-{i}" for i in range(size)])
            else:
                put(block, instead=rng.choice(list(slots)))

    def search(found: GalleryIndex, seen: int) -> int:
        blocks = [(match.metadata or {})["block"] for match in found.search(QUERIES, 1000, threads=1)[1].matches]
        state = frozenset(blocks)
        assert sorted(blocks) == sorted(list(state) * size), f"half a block: {blocks}"
        at = next((n for n in range(seen, len(states)) if states[n] == state), None)
        assert at is not None, f"{sorted(state)} is older than state {seen}, or never was"
        return at

    def work(number: int) -> None:
        rng, seen = random.Random(number), 0
        try:
            while time.monotonic() < until or (not min(answers) and not failures):  # all have their turn, however busy the machine is
                if number < 2:
                    change(rng)
                elif number == 2:
                    index.compact() if rng.random() < 0.2 else index.save(path)
                elif number < 6:
                    reader.refresh()
                    seen = search(reader, seen)
                else:
                    seen = search(index, seen)
                answers[number] += 1
        except Exception as error:
            failures.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert min(answers) > 0
    reader.verify()
    print(f"{len(states)} states, {answers[2]} saves, {sum(answers[3:6])} answers of the reader, {sum(answers[6:])} of the index")


READER = """
import sys, time
from dqe_engine.index import GalleryIndex
from support.samples import query_rows
path, until = sys.argv[1], time.time() + float(sys.argv[2])
index, followed, seen = GalleryIndex.load(path), 0, 0
while time.time() < until:
    followed += index.refresh()
    found = index.search(query_rows(1), 1000)[0].matches
    numbers = sorted(match.metadata["n"] for match in found)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), numbers
    assert numbers[-1] >= seen, (numbers[-1], seen)
    seen = numbers[-1]
print(followed, seen)
"""


def test_processes_follow_one_writer(make_index: MakeIndex, tmp_path: Path) -> None:
    """Each save holds consecutive numbers. Readers find them consecutive, and never older than before."""
    path, seconds = tmp_path / "index", float(os.environ.get("DQE_FOLLOW_SECONDS", "3"))
    count = int(os.environ.get("DQE_FOLLOW_READERS", "3"))
    index = make_index()
    index.add(["k0"], target_rows(1), metadata=[{"n": 0}])
    index.save(path)
    roots = [Path(__file__).parents[1], Path(__file__).parents[2]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", READER, str(path), str(seconds)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(count)]
    n = 0
    while any(reader.poll() is None for reader in readers):
        n += 1
        index.add([f"k{n}"], target_rows(1, n), metadata=[{"n": n}])
        if len(index) > 40:
            index.remove(list(index.ids)[:30])
        index.save(path)
    results = [(reader.communicate(), reader.returncode) for reader in readers]
    assert [code for _, code in results] == [0] * count, results
    assert all(int(out.split()[0]) > 3 for (out, _), _ in results), results
    print(f"{n} saves; followed, newest: {', '.join('/'.join(out.split()) for (out, _), _ in results)}")


@pytest.mark.parametrize("follow", [True, False])
def test_a_reader_that_two_compactions_overtake(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    """Between a manifest and the files that it names, which are gone by then: the reader looks again."""
    path, read_events = tmp_path / "index", disk.read_events
    index = make_index(6)
    index.save(path)
    reader = GalleryIndex.load(path)
    index.remove(["i0"])
    index.save(path)

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(disk, "read_events", read_events)
        for id in ("i1", "i2"):
            index.remove([id])
            index.compact()
        return read_events(*arguments, **options)

    monkeypatch.setattr(disk, "read_events", overtaken)
    if follow:
        assert reader.refresh()
    else:
        reader = GalleryIndex.load(path)
    assert reader.ids == ("i3", "i4", "i5")
