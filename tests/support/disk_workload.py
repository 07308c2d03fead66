"""A process whose saves are recorded or made to fail by `disk_calls.c`: what it confirmed goes to its output, a JSON line each."""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from support.samples import image_rows, target_rows

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
        change(index, rng)


if __name__ == "__main__":
    {"record": record}[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))  # type: ignore[arg-type]
