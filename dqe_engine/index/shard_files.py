"""A sharded index on disk: a folder of indexes, each a run of the items of one whole, and `shards.json`, which names them in order.

    shards.json                   the shards in order, each with the revision that belongs to this state of the whole
    <cut>-000/, <cut>-001/, …     indexes; the oldest items are in the first

The shards one after the other are the whole index: its items, from the oldest to the newest. So a tie between two shards is settled by
their order, and an index grows by its last shard, or by one more, without moving an item. `shards.json` is replaced last and atomically;
a reader takes the revisions that it names or none.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from dqe_engine.contracts.parsing import Contract, to_json
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import IndexConflictError, IndexFormatError, InputError
from dqe_engine.files import atomic_write, describe_write_error, make_directories, try_directory_lock

from .gallery import GalleryIndex
from .snapshot import Snapshot
from .storage import ImageStorage, Storage
from .validation import check_count, quoted

SHARDS_FILE = "shards.json"
_OURS = re.compile(r"[0-9a-f]{8}-\d{3,}")
_SAVED_BYTES = 256 << 20
"""Tokens that are copied between two saves of a new shard, so that memory does not grow with it."""
_FULL = 2.0
"""How many times the mean of the others the last shard may hold before the caller is told to cut again."""

Progress = Callable[[int, int], None]


class ShardEntry(Contract, frozen=True):
    """One shard: its folder, relative to `shards.json`, the revision that belongs to the whole, and how many items it then has."""

    name: str
    revision: str
    items: int

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name or "\0" in self.name:
            raise ValueError(f"{self.name!r} is not the name of a folder beside {SHARDS_FILE}")


class ShardSet(Versioned, frozen=True, kw_only=True):
    """`shards.json`. source: generation and rows of the index that was cut; both None for indexes that were joined."""

    kind: Literal["sharded-index"] = "sharded-index"
    schema_version: int = 1
    model_hash: str
    storage: Storage
    image_storage: ImageStorage
    target_shape: tuple[int, int]
    image_shape: tuple[int, int]
    source_generation: str | None
    source_rows: int | None
    shards: tuple[ShardEntry, ...]

    @property
    def items(self) -> int:
        return sum(shard.items for shard in self.shards)

    @property
    def revision(self) -> str:
        """Another one for every state of the whole."""
        return hashlib.blake2b(" ".join(shard.revision for shard in self.shards).encode(), digest_size=8).hexdigest()

    def describe(self) -> str:
        """`3 shards of 10, 10 and 11`; of many, the smallest and the largest."""
        sizes = [shard.items for shard in self.shards]
        if len(sizes) > 5:
            return f"{len(sizes)} shards of {min(sizes)} to {max(sizes)}"
        if len(sizes) == 1:
            return f"1 shard of {sizes[0]}"
        return f"{len(sizes)} shards of {', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"

    @property
    def overfull(self) -> bool:
        """Whether the last shard, which takes what is new, has grown far beyond the others."""
        *others, last = (shard.items for shard in self.shards)
        return bool(others) and last > 1000 and last * len(others) > _FULL * sum(others)


def read_shards(root: str | os.PathLike[str]) -> ShardSet:
    """Raises IndexFormatError."""
    path = Path(root) / SHARDS_FILE
    try:
        return read_document(ShardSet, path, remedy="remove this file and cut the index again with dqe-index shard", error=IndexFormatError)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexFormatError(f"{root}: no sharded index here ({SHARDS_FILE} is missing); make one with dqe-index shard") from error


def cut_index(
    index: GalleryIndex, out: str | os.PathLike[str], shards: int, *, anew: bool = False, progress: Progress | None = None
) -> ShardSet:
    """Bring the sharded index `out` to what a saved index holds now.

    Made anew where it is missing, where the number of shards differs, where the index was compacted since, and with `anew`: equal runs of
    items. Else what was removed since is removed, and what is new is added to the last shard. Readers see the old state or the new
    one. Raises InputError for an index with unsaved changes, and IndexConflictError where `out` holds other things.
    """
    check_count("shards", shards, 1)
    now, root = index.snapshot(), Path(out).absolute()
    if now.generation is None:
        raise InputError("the index has changes that are not saved; save it first, then cut it")
    try:
        make_directories(root)
        with try_directory_lock(root) as free:
            if not free:
                raise IndexConflictError(f"{root}: another process is writing this sharded index; run the same command when it is done")
            before = _present(root)
            if before is not None and before.model_hash != index.model_hash and not anew:
                raise IndexFormatError(f"{root} was cut from an index of another model; pass anew=True (--force) to replace it")
            if before is not None and before.source_generation is None and not anew:
                raise IndexFormatError(
                    f"{root} was joined from separate indexes; pass anew=True (--force) to replace it with shards of this one"
                )
            follows = before is not None and before.source_generation == now.generation and (before.source_rows or 0) <= now.rows
            if before is not None and follows and len(before.shards) == shards and not anew:
                cut = _follow(index, now, root, before, progress or _silent)
            else:
                cut = _cut(index, now, root, shards, progress or _silent)
            _put(root, cut)
            return cut
    except OSError as error:
        raise IndexFormatError(describe_write_error(error, root)) from error


def join_indexes(out: str | os.PathLike[str], names: Sequence[str] | None = None) -> ShardSet:
    """Make the saved indexes in the folder `out` the shards of one, in the order of `names`; without them, in the order that they have in
    `shards.json`, and then what is new there by its name, part-9 before part-10.

    For what is too large for one machine to hold, and for one more shard: each is built and kept up to date by itself; run this after every
    change. Raises InputError for an id that two of them have, and IndexFormatError for indexes that differ in model, shape or precision.
    """
    root = Path(out).absolute()
    found = _in_order(root) if names is None else list(names)
    if not found or len(set(found)) != len(found):
        raise InputError(f"{root}: expected at least one index in this folder, each named once; got {quoted(found)}")
    entries, layouts, codes = list[ShardEntry](), [], list[np.ndarray[tuple[int], np.dtype[np.uint64]]]()
    for name in found:
        with GalleryIndex.load(root / name) as index:
            now = index.snapshot()
            entries.append(ShardEntry(name=name, revision=now.revision or "", items=now.count))
            layouts.append((index.model_hash, index.storage, index.image_storage, index.target_shape, index.image_shape))
            codes.append(np.array([_code(id) for id in now.ids()], np.uint64))
            if layouts[-1] != layouts[0]:
                raise IndexFormatError(
                    f"{root / name} and {root / found[0]} differ in model, shapes or precision, which shards must share; index one of "
                    "them again"
                )
    values, counts = np.unique(np.concatenate(codes), return_counts=True)
    if (counts > 1).any():
        suspects = set(values[counts > 1].tolist())
        _refuse_repeated(root, found, suspects)
    model_hash, storage, image_storage, target_shape, image_shape = layouts[0]
    joined = ShardSet(
        model_hash=model_hash, storage=storage, image_storage=image_storage, target_shape=target_shape, image_shape=image_shape,
        source_generation=None, source_rows=None, shards=tuple(entries),
    )  # fmt: skip
    try:
        _put(root, joined)
    except OSError as error:
        raise IndexFormatError(describe_write_error(error, root)) from error
    return joined


def _in_order(root: Path) -> list[str]:
    """The indexes in the folder. What a shard is called by its number, and who wins a tie, stays as it was when others join."""
    there = {path.parent.name for path in root.glob("*/manifest.json")}
    before = [shard.name for shard in read_shards(root).shards if shard.name in there] if (root / SHARDS_FILE).exists() else []
    return before + sorted(there - set(before), key=_natural)


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split("([0-9]+)", name)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


def _refuse_repeated(root: Path, names: Sequence[str], suspects: set[int]) -> None:
    """Raise InputError where ids of equal codes are equal themselves."""
    where: dict[str, str] = {}
    for name in names:
        with GalleryIndex.load(root / name) as index:
            for id in index.ids:
                if _code(id) in suspects:
                    if id in where:
                        raise InputError(
                            f"{root}: {id!r} is in {where[id]} and in {name}; an item is in one shard, remove it from the other"
                        )
                    where[id] = name


def _code(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def _present(root: Path) -> ShardSet | None:
    """What `root` holds; None for an empty folder, or what a killed cut left. Raises IndexConflictError for other things."""
    if (root / SHARDS_FILE).exists():
        return read_shards(root)
    if others := sorted(entry.name for entry in root.iterdir() if not _OURS.fullmatch(entry.name)):
        raise IndexConflictError(f"{root} holds other things ({quoted(others)}) and no sharded index; name a new folder")
    return None


def _put(root: Path, cut: ShardSet) -> None:
    with atomic_write(root / SHARDS_FILE) as stream:
        stream.write(to_json(cut))


def _cut(index: GalleryIndex, now: Snapshot, root: Path, shards: int, progress: Progress) -> ShardSet:
    """New folders with equal runs of the items; folders that neither `shards.json` nor this names are removed."""
    kept = {shard.name for shard in read_shards(root).shards} if (root / SHARDS_FILE).exists() else set()
    for entry in root.iterdir():
        if _OURS.fullmatch(entry.name) and entry.name not in kept:
            shutil.rmtree(entry)
    rows, prefix = now.live_rows(), secrets.token_hex(4)
    ends = [len(rows) * part // shards for part in range(shards + 1)]
    entries = []
    for number, (start, end) in enumerate(pairwise(ends)):
        name = f"{prefix}-{number:03}"
        shard = GalleryIndex(
            model_hash=index.model_hash, target_shape=index.target_shape, image_shape=index.image_shape, storage=index.storage,
            image_storage=index.image_storage, screened=False,
        )  # fmt: skip
        _copy(now, rows[start:end].tolist(), shard, root / name, progress, done=start, total=len(rows))
        entries.append(_entry(name, shard))
        shard.close()
    return _set(index, now, entries)


def _follow(index: GalleryIndex, now: Snapshot, root: Path, before: ShardSet, progress: Progress) -> ShardSet:
    """Removals and additions since the last cut. Additions come first: what is killed between can be run again."""
    assert before.source_rows is not None
    new = [row for row in now.live_rows().tolist() if row >= before.source_rows]
    entries = list[ShardEntry]()
    for number in reversed(range(len(before.shards))):
        name = before.shards[number].name
        with GalleryIndex.load(root / name, model_hash=index.model_hash, screened=False) as shard:
            last = number == len(before.shards) - 1
            gone = [id for id in shard.ids if (row := now.row(id)) is None or row >= before.source_rows]
            if gone:
                shard.remove(gone)  # with what a killed run added, which is added again below
            if last and new:
                _copy(now, new, shard, root / name, progress, done=0, total=len(new))
            else:
                shard.save(root / name)
            entries.append(_entry(name, shard))
    return _set(index, now, entries[::-1])


def _copy(now: Snapshot, rows: Sequence[int], shard: GalleryIndex, place: Path, progress: Progress, *, done: int, total: int) -> None:
    """Add these rows of `now` to `shard`, in order, and save it. `done` of `total`: rows of other shards that were copied before."""
    size = 4 * int(np.prod(shard.target_shape)) + (0 if shard.image_storage == "none" else 4 * int(np.prod(shard.image_shape)))
    step = max(1, _SAVED_BYTES // size)
    starts = range(0, len(rows), step)
    for start in starts:
        some_rows = rows[start : start + step]
        items = [now.item(row) for row in some_rows]
        shard.add(
            [item.id for item in items],
            np.stack([now.target_tokens(row) for row in some_rows]),
            None if shard.image_storage == "none" else np.stack([now.image_tokens(row) for row in some_rows]),
            [item.metadata for item in items],
            contents=[item.content for item in items],
        )
        shard.save(place)
        progress(done + start + len(some_rows), total)
    if not starts:
        shard.save(place)


def _entry(name: str, shard: GalleryIndex) -> ShardEntry:
    now = shard.snapshot()
    assert now.revision is not None
    return ShardEntry(name=name, revision=now.revision, items=now.count)


def _set(index: GalleryIndex, now: Snapshot, entries: Sequence[ShardEntry]) -> ShardSet:
    return ShardSet(
        model_hash=index.model_hash, storage=index.storage, image_storage=index.image_storage, target_shape=index.target_shape,
        image_shape=index.image_shape, source_generation=now.generation, source_rows=now.rows, shards=tuple(entries),
    )  # fmt: skip


def _silent(done: int, total: int) -> None:
    pass
