"""A run that is not finished: its blocks in a folder beside the one that they become, which one process holds.

OUT.partial/        its lock (flock) keeps a second run out
    run.json        what is being mined, and the bounds that pooled zones came to
    <start>-<stop>-<SHA-256>.npy    a finished block of queries, one record per query
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dqe_engine.contracts.manifest import FileEntry
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.files import TEMPORARY_PREFIX, atomic_write, sha256_of

from .mined_folder import MANIFEST_FILE, MiningManifest, layout
from .mining import ARRAYS, MinedNegatives, MiningJob
from .mining_plan import SCHEMA_VERSION, MiningPlan, differences, lifted

_RUN_FILE = "run.json"
_BLOCK_FILE = re.compile(r"(\d{12})-(\d{12})-([0-9a-f]{64})\.npy")


class MiningRun(Versioned, frozen=True, kw_only=True):
    """`resolved`: the absolute zones that the plan's pooled ones came to when the run began, with which it goes on; else None."""

    kind: Literal["mining-run"] = "mining-run"
    schema_version: int = SCHEMA_VERSION
    plan: MiningPlan
    resolved: ZoneSpec | None = None

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        return lifted(data)


def _record(picks: int) -> np.dtype[Any]:
    return np.dtype(list(layout(picks).items()))


def write_block(partial: Path, start: int, stop: int, mined: MinedNegatives, plan: MiningPlan) -> None:
    records = np.empty(stop - start, _record(plan.picks))
    for name in ARRAYS:
        records[name] = getattr(mined, name)
    buffer = io.BytesIO()
    np.save(buffer, records)
    content = buffer.getvalue()
    # The checksum in the name: the block is there and verifiable with one rename.
    with atomic_write(partial / f"{start:012}-{stop:012}-{hashlib.sha256(content).hexdigest()}.npy") as stream:
        stream.write(content)


def resume(partial: Path, plan: MiningPlan, job: MiningJob, force: bool) -> tuple[MiningRun, list[tuple[int, int]], int]:
    """The run, begun or gone on with; ranges of queries whose blocks are there and whole, ascending; and how many blocks were
    damaged, and are removed."""
    path = partial / _RUN_FILE
    run: MiningRun | None = None
    if path.is_file():
        try:
            run = read_document(MiningRun, path, remedy="the run cannot be gone on with", error=InputError)
            problem = None if run.plan == plan else f"{partial}: an interrupted run with {differences(plan, run.plan)}"
        except InputError as error:
            problem = str(error)
        if problem and not force:
            raise InputError(f"{problem}; repeat its options to go on, or start anew with --force")
        if problem:
            run = None
    if run is None:
        empty(partial)  # blocks of another run, or of nobody knows what
        run = MiningRun(plan=plan, resolved=job.applied_zones if plan.zones.bounds == "pooled" else None)
        with atomic_write(path) as stream:
            stream.write(to_json(run))
    done, damaged, reached = [], 0, 0
    for file in sorted(partial.iterdir()):
        if file.name.startswith(TEMPORARY_PREFIX):
            file.unlink()
        elif match := _BLOCK_FILE.fullmatch(file.name):
            start, stop = int(match[1]), int(match[2])
            if not file.is_file() or start < reached or sha256_of(file) != match[3]:
                file.unlink()
                damaged += 1
            else:
                done.append((start, stop))
                reached = stop
    return run, done, damaged


def missing(done: list[tuple[int, int]], total: int, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `block` queries that cover what `done` leaves."""
    at = 0
    for start, stop in [*done, (total, total)]:
        for first in range(at, start, block):
            yield first, min(first + block, start)
        at = stop


def assemble(partial: Path, new: Path, run: MiningRun) -> MiningManifest:
    """Write the arrays from the blocks, and the manifest."""
    plan = run.plan
    rows = layout(plan.picks)
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context(open(new / f"{name}.npy", "wb")) for name in ARRAYS}
        for name, stream in streams.items():
            header = {"descr": rows[name].base.str, "fortran_order": False, "shape": (plan.queries, *rows[name].shape)}
            np.lib.format.write_array_header_1_0(stream, header)
        for path in sorted(path for path in partial.iterdir() if _BLOCK_FILE.fullmatch(path.name)):
            records = np.load(path)
            for name, stream in streams.items():
                stream.write(np.ascontiguousarray(records[name]).data)
    entries = [FileEntry(path=path.name, size=path.stat().st_size, sha256=sha256_of(path)) for path in sorted(new.iterdir())]
    manifest = MiningManifest(plan=plan, resolved=run.resolved, files=tuple(entries))
    (new / MANIFEST_FILE).write_bytes(to_json(manifest))
    return manifest


def empty(partial: Path) -> None:
    """Remove our files; the directory itself goes with the lock."""
    for path in partial.iterdir():
        if path.name == _RUN_FILE or path.name.startswith(TEMPORARY_PREFIX) or _BLOCK_FILE.fullmatch(path.name):
            path.unlink()


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
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
