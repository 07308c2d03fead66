"""A process whose saves are recorded or made to fail by `disk_calls.c`: what it confirmed goes to its output, a JSON line each."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from support.samples import image_rows, query_rows, target_rows

from dqe_engine.errors import DQEError
from dqe_engine.index import GalleryIndex

Kept = dict[str, list[Any]]  # by id: the seed of its tokens, and its metadata


def recorder() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.disk_calls_fail.restype = ctypes.c_long
    return library


def new_index() -> GalleryIndex:
    return GalleryIndex(model_hash="m" * 32, target_shape=(2, 4), image_shape=(3, 5), image_storage="f16")


def contents(index: GalleryIndex) -> Kept:
    """What it holds, held against the tokens that each id's metadata says it was made of."""
    found: Kept = {}
    for item in index:
        assert item.metadata is not None
        seed = item.metadata["seed"]
        np.testing.assert_array_equal(index.target_tokens(item.id), target_rows(1, seed)[0])
        np.testing.assert_array_equal(index.image_tokens(item.id), image_rows(1, seed)[0].astype(np.float16))
        found[item.id] = [seed, item.metadata]
    return found


def add(index: GalleryIndex, ids: list[str], seeds: list[int]) -> None:
    targets, images = np.concatenate([target_rows(1, s) for s in seeds]), np.concatenate([image_rows(1, s) for s in seeds])
    index.add(ids, targets, images, [{"seed": s} for s in seeds], replace=True)


def change(index: GalleryIndex, rng: random.Random) -> None:
    """One of what may come before a save, at random."""
    some = rng.sample(index.ids, min(2, len(index)))
    action = rng.choice(("add", "add", "replace", "remove", "metadata", "most"))
    if action == "add" or not some:
        add(index, [f"k{rng.randrange(10**6)}" for _ in range(3)], [rng.randrange(10**6) for _ in range(3)])
    elif action == "replace":
        add(index, some, [rng.randrange(10**6) for _ in some])
    elif action == "metadata":
        index.update_metadata({item.id: {**(item.metadata or {}), "n": rng.random()} for item in index.get(some)})
    else:  # of most, so that the save compacts
        index.remove(some[:1] if action == "remove" else index.ids[: len(index) * 2 // 3])


def die_after_replace() -> None:
    replace = os.replace
    os.replace = lambda *names: (replace(*names), os._exit(0))  # type: ignore[assignment]


def record(path: Path, saves: int, seed: int) -> None:
    """Saves, each begun and confirmed with a mark. At every fourth, a compaction, the process dies between the rename of the
    manifest and its sync, and another goes on with what it finds."""
    rng, index, calls = random.Random(seed), new_index(), recorder()
    add(index, ["a", "b"], [1, 2])
    for number in range(1, saves + 1):
        print(json.dumps(contents(index)), flush=True)
        calls.disk_calls_mark(f"begin {number}".encode())
        if number % 4 == 3:
            if (child := os.fork()) == 0:
                die_after_replace()
                index.compact()
            os.waitpid(child, 0)
            index = GalleryIndex.load(path)
        else:
            index.compact() if number % 8 == 6 else index.save(path)
            calls.disk_calls_mark(f"confirmed {number}".encode())
        if number % 8 != 3:  # else the next save has nothing to do but to make sure of what it found
            change(index, rng)


def fail(path: Path, error: int, all_after: int) -> None:
    """For every n, the n-th call of a save fails (or all from it on, as on a full disk), for first saves, appending and compacting."""
    calls, tried = recorder(), 0
    queries = query_rows(2)
    for kind in ("first", "append", "compact"):
        for nth in range(1, 1000):
            tried += 1
            place = path / f"{kind}{nth}"
            index = new_index()
            add(index, ["a", "b", "c"], [1, 2, 3])
            reader, before = None, {}
            if kind != "first":
                index.save(place)
                before = contents(index)
                reader = GalleryIndex.load(place)
                add(index, ["b", "d"], [4, 5])
                if kind == "compact":
                    index.remove(["a", "c"])
            wanted, answers = contents(index), index.search(queries, 9)
            calls.disk_calls_fail(nth, error, all_after)
            failed = False
            try:
                index.save(place)
            except DQEError:
                failed = True
            count = calls.disk_calls_fail(0, 0, 0)
            assert failed or count < nth, f"{kind} {nth}: a call failed, and the save did not say so"
            assert contents(index) == wanted, f"{kind} {nth}: the index in memory changed"
            assert index.search(queries, 9) == answers
            if reader is not None:
                assert contents(reader) == before, f"{kind} {nth}: a reader's rows changed"
                assert contents(GalleryIndex.load(place, verify=True)) in (before, wanted), f"{kind} {nth}: half a save"
                reader.refresh()
                assert contents(reader) in (before, wanted)
            add(index, ["e"], [6])
            index.save(place)
            wanted["e"] = [6, {"seed": 6}]
            assert contents(GalleryIndex.load(place, verify=True)) == contents(index) == wanted, f"{kind} {nth}: after the next save"
            if reader is not None:
                reader.refresh()
                assert contents(reader) == wanted
            if not failed:
                break
    print(json.dumps(tried))


def write_until_killed(path: Path, said: Path, seed: int) -> None:
    """Change and save for ever; what is to be saved is said before, and that it was after."""
    rng, index = random.Random(seed), new_index()
    if (path / "manifest.json").exists():
        index = GalleryIndex.load(path, verify=True)
    with open(said, "a") as stream:
        while True:
            for _ in range(rng.randint(1, 3)):
                change(index, rng)
            print(json.dumps(contents(index)), file=stream, flush=True)
            index.compact() if index.stats().path and rng.random() < 0.1 else index.save(path)
            print("saved", file=stream, flush=True)


def kill(path: Path, kills: int, seed: int) -> None:
    """Writers in a row die by SIGKILL at random moments, each going on with what the one before left, while this process follows. A writer
    has none to three saves before its last, however long a busy machine takes for them."""
    rng, said = random.Random(seed), path.with_suffix(".said")
    saves, cut, followed, confirmed, reader = 0, 0, 0, dict[str, Any](), None
    for number in range(kills):
        said.write_text("")
        if (child := os.fork()) == 0:
            try:
                write_until_killed(path, said, seed * 100_000 + number)
            finally:
                os._exit(1)
        seen, until = [], None
        while until is None or time.monotonic() < until:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer ended by itself"
            if reader is None and (path / "manifest.json").exists():
                reader = GalleryIndex.load(path)
            if reader is not None and (reader.refresh() or not seen):
                seen.append(contents(reader))
            if until is None and said.read_text().count("\n") > 2 * (number % 4):  # so many are confirmed, and one more has begun
                until = time.monotonic() + rng.uniform(0, 0.02)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"
        lines = [line for line in said.read_text().splitlines(keepends=True) if line.endswith("\n")]
        begun = [json.loads(line) for line in lines if line != "saved\n"]
        done = lines.count("saved\n")
        allowed = [confirmed, *begun]
        for each in seen:
            assert each in allowed, f"kill {number}: a reader saw what nobody saved"
            allowed = allowed[allowed.index(each) :]
        if done:
            confirmed = begun[done - 1]
        found = contents(GalleryIndex.load(path, verify=True)) if (path / "manifest.json").exists() else {}
        assert found in (confirmed, *begun[done:]), f"kill {number}: neither the confirmed save nor the one that was under way"
        cut += len(begun) > done
        saves, followed, confirmed = saves + done, followed + len(seen), found
    print(json.dumps([saves, cut, followed]))


if __name__ == "__main__":
    {"record": record, "fail": fail, "kill": kill}[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
