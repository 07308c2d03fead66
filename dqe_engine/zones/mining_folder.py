"""Mining to a folder: interrupted or killed at any moment, a rerun goes on where it stopped and ends with the same bytes.

OUT/                whole or absent
    mined.json      what was mined from which inputs (their SHA-256), with which bounds; sizes and SHA-256 of the arrays
    picks.npy, pick_scores.npy, counts.npy, lo.npy, hi.npy, anchor_scores.npy
OUT.partial/        while a run is unfinished; its lock (flock) keeps a second run out
    run.json        what is being mined, and the bounds that pooled zones came to
    <start>-<stop>-<SHA-256>.npy    a finished block of queries, one record per query
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.array_files import open_array
from dqe_engine.contracts.manifest import FileEntry
from dqe_engine.contracts.parsing import NOT_JSON, Contract, parse_json, to_json
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.files import (
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_write,
    describe_os_error,
    describe_write_error,
    recover_directory,
    remove_stale_temporaries,
    require_regular,
    sha256_of,
)

from .mining import ARRAYS, MinedNegatives, MiningJob, Progress, no_progress

SCHEMA_VERSION = 1
MANIFEST_FILE = "mined.json"
_RUN_FILE = "run.json"
_BLOCK_FILE = re.compile(r"(\d{12})-(\d{12})-([0-9a-f]{64})\.npy")
_READ_BYTES = 1 << 24
_MOST_PICKS = 1 << 24


class MiningPlan(Contract, frozen=True, kw_only=True):
    """What decides every byte of a result. A run is resumed only by the same plan."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["mined-negatives"] = "mined-negatives"
    queries: int
    items: int
    tokens: int
    width: int
    picks: int
    zones: ZoneSpec
    backend: str
    sha256: dict[str, str]
    """Of the inputs, by name; the gallery's is of its shards taken together."""
    nonfinite: dict[str, int]
    """Rows of an input that hold NaN or infinities, by its name."""

    def __post_init__(self) -> None:
        if not 0 <= self.picks <= _MOST_PICKS:  # what one record of NumPy's can have
            raise InputError(f"{self.picks} picks per query, expected 0 to {_MOST_PICKS}")


class MiningRun(Contract, frozen=True, kw_only=True, omit_defaults=True):
    """`resolved`: the absolute zones that the plan's pooled ones came to when the run began, with which it goes on; else None."""

    plan: MiningPlan
    resolved: ZoneSpec | None = None


class MiningManifest(MiningRun, frozen=True, kw_only=True):
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningOutcome:
    """What a call of `mine_to_folder` did."""

    manifest: MiningManifest
    mined: int
    """Queries mined by this call; the others were there."""
    damaged_blocks: int
    """Blocks of an interrupted run that were damaged, and mined again."""


def mine_to_folder(
    out: Path,
    job: MiningJob,
    *,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = no_progress,
    reading: Progress = no_progress,
) -> MiningOutcome:
    """Mine into the folder `out`, resuming what an interrupted run left beside it; a finished run is recognised.

    A kill loses at most the job's `block` of queries. `reading` is told of the bytes of the inputs that were read to identify
    them, `progress` of the queries done, first of those that an earlier run had done.
    `force`: replace what `out` holds, when the new one is complete, and drop an interrupted run of another plan.

    Raises InputError where `out` holds something else, where inputs or options changed, where the inputs hold NaN or
    infinities (unless `allow_nonfinite`: queries without a score get no picks, items without one are never picked), where
    another process mines to `out`, and where the disk does not take the result.
    """
    out = _named(out)
    for bound in (job.zones.lo, job.zones.hi):
        if not np.isfinite(bound):
            raise InputError(f"zone bound {bound}: a stored plan needs finite bounds; take ±1e9 for none")
    partial = _partial(out)
    with _disk_errors(out), _locked(partial):
        remove_stale_temporaries(out)
        plan = _make_plan(job, reading)
        if not allow_nonfinite:
            _refuse_nonfinite(plan)
        if not force and (finished := _finished(out, plan)):
            _empty(partial)
            progress(plan.queries, plan.queries)
            return MiningOutcome(manifest=finished, mined=0, damaged_blocks=0)
        with atomic_directory(out, replace=force or _is_empty(out), marker=MANIFEST_FILE) as new:
            run, done, damaged = _resume(partial, plan, job, force)
            job = dataclasses.replace(job, zones=run.resolved or plan.zones)
            before = count = sum(stop - start for start, stop in done)
            progress(count, plan.queries)
            for start, stop in _missing(done, plan.queries, job.block):
                _write_block(partial, start, stop, job.rows(start, stop), plan)
                count += stop - start
                progress(count, plan.queries)
            manifest = _assemble(partial, new, run)
        _empty(partial)
    return MiningOutcome(manifest=manifest, mined=count - before, damaged_blocks=damaged)


def read_mined(folder: Path, *, verify: bool = True) -> tuple[MiningManifest, MinedNegatives]:
    """A finished folder; its arrays are memory-mapped. Raises InputError for one that is missing or damaged.

    `verify`: hold every file against its SHA-256, which reads them all.
    """
    folder = _named(folder)
    path = folder / MANIFEST_FILE
    with contextlib.suppress(OSError):
        recover_directory(folder)
    try:
        require_regular(path)
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = f"; a run to it is unfinished, run dqe-mine again ({partial})" if (partial := _partial(folder)).is_dir() else ""
        raise InputError(f"{folder}: no mined negatives here (no {MANIFEST_FILE}){hint}") from error
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
    manifest = _parse(MiningManifest, raw, path)
    if sorted(entry.path for entry in manifest.files) != sorted(f"{name}.npy" for name in ARRAYS):
        raise InputError(f"{path}: lists other files than those of mined negatives; mine again with --force")
    for entry in manifest.files:
        file = folder / entry.path
        if not file.is_file() or file.stat().st_size != entry.size or (verify and sha256_of(file) != entry.sha256):
            raise InputError(f"{file}: missing or damaged (its SHA-256 is not that in {MANIFEST_FILE}); mine again with --force")
    layout = _layout(manifest.plan.picks)
    arrays = {}
    for name in ARRAYS:
        arrays[name] = _read_array(folder / f"{name}.npy", (manifest.plan.queries, *layout[name].shape), layout[name].base)
    return manifest, MinedNegatives(**arrays, backend=manifest.plan.backend)


# -- what identifies a run ---------------------------------------------------------------------------------------------


def _make_plan(job: MiningJob, reading: Progress) -> MiningPlan:
    inputs: dict[str, Sequence[NDArray[Any]]] = {"queries": (job.queries,), "gallery": job.shards, "targets": (job.targets,)}
    if job.exclude is not None:
        inputs["exclude"] = (job.exclude,)
    total = sum(array.nbytes for arrays in inputs.values() for array in arrays)
    done, hashes, nonfinite = 0, {}, {}
    for name, arrays in inputs.items():
        digest, bad, kind = hashlib.sha256(), 0, None
        for chunk in (chunk for array in arrays for chunk in _chunks(array)):
            if kind != (kind := f"{chunk.dtype.str} {chunk.shape[1:]}"):  # not per shard: another cut is the same gallery
                digest.update(kind.encode())
            digest.update(chunk.reshape(-1).view(np.uint8).data)
            bad += _nonfinite_rows(chunk)
            done += chunk.nbytes
            reading(done, total)
        hashes[name] = digest.hexdigest()
        if bad:
            nonfinite[name] = bad
    shape = job.shards[0].shape
    return MiningPlan(
        queries=len(job.queries), items=job.size, tokens=shape[1] if len(shape) == 3 else 1, width=shape[-1], picks=job.picks,
        zones=job.zones, backend=job.resolved_backend, sha256=hashes, nonfinite=nonfinite,
    )  # fmt: skip


def _chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    step = max(1, _READ_BYTES // max(1, array.itemsize * int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step])


def _nonfinite_rows(chunk: NDArray[Any]) -> int:
    if chunk.dtype.kind != "f" or (finite := np.isfinite(chunk)).all():
        return 0
    return int((~finite.reshape(len(chunk), -1).all(axis=1)).sum())


def _refuse_nonfinite(plan: MiningPlan) -> None:
    if plan.nonfinite:
        totals = {"gallery": plan.items}
        rows = ", ".join(f"{count} of {totals.get(name, plan.queries)} rows of {name}" for name, count in plan.nonfinite.items())
        raise InputError(f"NaN or infinities in {rows}; look at what made them, or go on with --allow-nan (they get no picks)")


def _differences(ours: MiningPlan, theirs: MiningPlan) -> str:
    """What changed, in words."""
    inputs = [name for name in sorted({*ours.sha256, *theirs.sha256}) if ours.sha256.get(name) != theirs.sha256.get(name)]
    values = {
        **{name: (getattr(ours, name), getattr(theirs, name)) for name in ("picks", "backend")},
        **{name: (getattr(ours.zones, name), getattr(theirs.zones, name)) for name in ZoneSpec.__struct_fields__},
    }
    options = [f"{name} {then} (now {now})" for name, (now, then) in values.items() if now != then]
    return ", ".join([*(f"other {name}" for name in inputs), *options])


def _finished(out: Path, plan: MiningPlan) -> MiningManifest | None:
    """The manifest in `out` if that plan has been carried out. Raises InputError where another one has."""
    if not (out / MANIFEST_FILE).is_file():
        return None
    manifest, _ = read_mined(out)
    if manifest.plan == plan:
        return manifest
    raise InputError(f"{out}: mined before with {_differences(plan, manifest.plan)}; choose another folder, or replace it with --force")


def _parse(kind: type[Any], raw: bytes, path: Path) -> Any:
    with contextlib.suppress(*NOT_JSON, AttributeError, TypeError):
        data = msgspec.json.decode(raw)
        version = data.get("plan", data).get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InputError(f"{path}: schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade dqe-engine")
    return parse_json(kind, raw, where=str(path))


# -- blocks ------------------------------------------------------------------------------------------------------------


def _layout(picks: int) -> dict[str, np.dtype[Any]]:
    """Dtype of one query's row of each array."""
    return {
        "picks": np.dtype(("<i8", (picks,))),
        "pick_scores": np.dtype(("<f4", (picks,))),
        "counts": np.dtype(("<i8", (3,))),
        "lo": np.dtype("<f4"),
        "hi": np.dtype("<f4"),
        "anchor_scores": np.dtype("<f4"),
    }


def _record(picks: int) -> np.dtype[Any]:
    return np.dtype(list(_layout(picks).items()))


def _write_block(partial: Path, start: int, stop: int, mined: MinedNegatives, plan: MiningPlan) -> None:
    records = np.empty(stop - start, _record(plan.picks))
    for name in ARRAYS:
        records[name] = getattr(mined, name)
    buffer = io.BytesIO()
    np.save(buffer, records)
    content = buffer.getvalue()
    # The checksum in the name: the block is there and verifiable with one rename.
    with atomic_write(partial / f"{start:012}-{stop:012}-{hashlib.sha256(content).hexdigest()}.npy") as stream:
        stream.write(content)


def _resume(partial: Path, plan: MiningPlan, job: MiningJob, force: bool) -> tuple[MiningRun, list[tuple[int, int]], int]:
    """The run, begun or gone on with; ranges of queries whose blocks are there and whole, ascending; and how many blocks were
    damaged, and are removed."""
    path = partial / _RUN_FILE
    run: MiningRun | None = None
    if path.is_file():
        try:
            run = _parse(MiningRun, path.read_bytes(), path)
            problem = None if run.plan == plan else f"{partial}: an interrupted run with {_differences(plan, run.plan)}"
        except InputError as error:
            problem = str(error)
        if problem and not force:
            raise InputError(f"{problem}; give what it was given, or start anew with --force")
        if problem:
            run = None
    if run is None:
        _empty(partial)  # blocks of another run, or of nobody knows what
        run = MiningRun(plan=plan, resolved=job.applied_zones if plan.zones.bounds == "pooled" else None)
        with atomic_write(path) as stream:
            stream.write(to_json(run))
    done, damaged, reached = [], 0, 0
    for file in sorted(partial.iterdir()):
        if file.name.startswith(TEMPORARY_PREFIX):
            file.unlink()
        elif match := _BLOCK_FILE.fullmatch(file.name):
            start, stop = int(match[1]), int(match[2])
            if start < reached or sha256_of(file) != match[3]:
                file.unlink()
                damaged += 1
            else:
                done.append((start, stop))
                reached = stop
    return run, done, damaged


def _missing(done: list[tuple[int, int]], total: int, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `block` queries that cover what `done` leaves."""
    at = 0
    for start, stop in [*done, (total, total)]:
        for first in range(at, start, block):
            yield first, min(first + block, start)
        at = stop


def _assemble(partial: Path, new: Path, run: MiningRun) -> MiningManifest:
    """Write the arrays from the blocks, and the manifest."""
    plan = run.plan
    layout = _layout(plan.picks)
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context(open(new / f"{name}.npy", "wb")) for name in ARRAYS}
        for name, stream in streams.items():
            header = {"descr": layout[name].base.str, "fortran_order": False, "shape": (plan.queries, *layout[name].shape)}
            np.lib.format.write_array_header_1_0(stream, header)
        for path in sorted(path for path in partial.iterdir() if _BLOCK_FILE.fullmatch(path.name)):
            records = np.load(path)
            for name, stream in streams.items():
                stream.write(np.ascontiguousarray(records[name]).data)
    entries = [FileEntry(path=path.name, size=path.stat().st_size, sha256=sha256_of(path)) for path in sorted(new.iterdir())]
    manifest = MiningManifest(plan=plan, resolved=run.resolved, files=tuple(entries))
    (new / MANIFEST_FILE).write_bytes(to_json(manifest))
    return manifest


def _read_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    array = open_array(path, "mine again with --force")
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{path}: {array.dtype} of shape {array.shape}, expected {dtype} {shape}; mine again with --force")
    return np.asarray(array)


# -- the folder --------------------------------------------------------------------------------------------------------


def _named(folder: Path) -> Path:
    """The folder by a path that ends in its name, which "." and ".." do not."""
    folder = Path(folder)
    return folder if folder.name and folder.name != ".." else folder.resolve()


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not any(out.iterdir())


def _empty(partial: Path) -> None:
    """Remove our files; the directory itself goes with the lock."""
    for path in partial.iterdir():
        if path.name == _RUN_FILE or path.name.startswith(TEMPORARY_PREFIX) or _BLOCK_FILE.fullmatch(path.name):
            path.unlink()


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold `partial`, made where needed and removed at the end where nothing is in it."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    while True:
        partial.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel even when we are killed
            except BlockingIOError as error:
                os.close(descriptor)
                raise InputError(f"{partial}: another process is mining to this folder; wait for it, or choose another one") from error
            if partial.exists() and os.path.samestat(os.fstat(descriptor), os.stat(partial)):
                break
            os.close(descriptor)
        # Its owner ended and removed it before it was locked.
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            partial.rmdir()
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError) and error.strerror is None:  # of atomic_directory, with its own advice
            raise InputError(f"{error}; choose another folder") from error
        raise InputError(f"{describe_write_error(error, out)}; finished blocks stay, run again to go on") from error
