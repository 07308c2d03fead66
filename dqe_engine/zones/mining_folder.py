"""Mining to a folder: interrupted or killed at any moment, a rerun goes on where it stopped and ends with the same bytes.

OUT, of `mined_folder`, is whole or absent. While a run is unfinished, its blocks are in OUT.partial, of `mining_blocks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dqe_engine.errors import InputError
from dqe_engine.files import atomic_directory, describe_write_error, remove_stale_temporaries

from .mined_folder import MANIFEST_FILE, MiningManifest, named, partial_of, read_mined
from .mining import MiningJob, Progress, no_progress
from .mining_blocks import assemble, empty, locked, missing, resume, write_block
from .mining_plan import MiningPlan, differences, make_plan, refuse_nonfinite


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
    out = named(out)
    for bound in (job.zones.lo, job.zones.hi):
        if not np.isfinite(bound):
            raise InputError(f"zone bound {bound}: a stored plan needs finite bounds; take ±1e9 for none")
    partial = partial_of(out)
    with _disk_errors(out), locked(partial):
        remove_stale_temporaries(out)
        plan = make_plan(job, reading)
        if not allow_nonfinite:
            refuse_nonfinite(plan)
        if not force and (finished := _finished(out, plan)):
            empty(partial)
            progress(plan.queries, plan.queries)
            return MiningOutcome(manifest=finished, mined=0, damaged_blocks=0)
        with atomic_directory(out, replace=force or _is_empty(out), marker=MANIFEST_FILE) as new:
            run, done, damaged = resume(partial, plan, job, force)
            job = dataclasses.replace(job, zones=run.resolved or plan.zones)
            before = count = sum(stop - start for start, stop in done)
            progress(count, plan.queries)
            for start, stop in missing(done, plan.queries, job.block):
                write_block(partial, start, stop, job.rows(start, stop), plan)
                count += stop - start
                progress(count, plan.queries)
            manifest = assemble(partial, new, run)
        empty(partial)
    return MiningOutcome(manifest=manifest, mined=count - before, damaged_blocks=damaged)


def _finished(out: Path, plan: MiningPlan) -> MiningManifest | None:
    """The manifest in `out` if that plan has been carried out. Raises InputError where another one has."""
    if not (out / MANIFEST_FILE).is_file():
        return None
    manifest, _ = read_mined(out)
    if manifest.plan == plan:
        return manifest
    raise InputError(f"{out}: mined before with {differences(plan, manifest.plan)}; choose another folder, or replace it with --force")


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not any(out.iterdir())


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError) and error.strerror is None:  # of atomic_directory, with its own advice
            raise InputError(f"{error}; choose another folder") from error
        raise InputError(f"{describe_write_error(error, out)}; finished blocks stay, run again to go on") from error
