"""Mining negatives: mid-zone picks for a whole set of queries, a block of them at a time, over a gallery in shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

from .arrays import F32, I64, shards_of
from .compiled import screens_panels
from .pooled import resolve_pooled
from .screen import MAX_WIDTH, Screen, screen_bytes
from .select import Backend, select_zones

QUERY_BLOCK = 4096
"""Queries per pass over the gallery: enough for the kernel to be bound by arithmetic, a few MiB of results."""

LEAST_SCREENED_QUERIES = 64
"""Building the screen reads the gallery once, which few queries do not repay."""
SCREEN_BYTES = 512 << 20
"""Mining screens the gallery (`Screen`) where that gains and the screen takes no more than this."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MinedNegatives:
    """P negatives for each of T queries, and what to judge them by. Δ of a pick is `anchor_scores` - `pick_scores`."""

    picks: I64
    """(T, P), positions in the gallery by pick key descending; padded with -1 where the mid zone holds fewer."""
    pick_scores: F32
    """(T, P), padded with -inf."""
    counts: I64
    """(T, 3): candidates in near, mid and easy."""
    lo: F32
    """(T,), the absolute bounds that applied; NaN where ranks were asked of a query without candidates."""
    hi: F32
    anchor_scores: F32
    """(T,), the targets' scores."""
    backend: str
    """What ran, as in `ZoneSelection`."""


ARRAYS = tuple(f.name for f in dataclasses.fields(MinedNegatives) if f.name != "backend")
"""The fields with one row per query."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MiningJob:
    """What to mine, checked. `rows` does the work; see `mine_negatives` for the arguments."""

    queries: F32
    items: NDArray[Any] | Sequence[NDArray[Any]]
    targets: I64 | F32
    zones: ZoneSpec
    picks: int
    exclude: I64 | None = None
    block: int = QUERY_BLOCK
    threads: int = 0
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if not self.shards:
            raise InputError("items: no shards; give at least one array")
        for option, value in (("picks", self.picks), ("block", self.block)):
            if value < 1:
                raise InputError(f"{option}={value}: expected 1 or more")
        select_zones(self.queries[:0], self.gallery, zones=self.zones, backend=self.backend)  # shapes and dtypes
        for name, array in (("targets", self.targets), ("exclude", self.exclude)):
            if array is not None and len(array) != len(self.queries):
                raise InputError(f"{name}: {len(array)} entries, expected {len(self.queries)}, one for each query")
        if self.exclude is not None:
            if self.exclude.ndim != 2 or self.exclude.dtype != np.int64:
                raise InputError(f"exclude: {self.exclude.dtype} of shape {self.exclude.shape}, expected int64 (T, E), padded with -1")
            self._check_ids("exclude", self.exclude, least=-1)
        if self.targets.ndim != 1 or self.targets.dtype not in (np.int64, np.float32):
            raise InputError(f"targets: {self.targets.dtype} of shape {self.targets.shape}, expected int64 ids or float32 scores (T,)")
        if self.by_id:
            self._check_ids("targets", self.targets, least=0)

    def _check_ids(self, name: str, ids: NDArray[Any], *, least: int) -> None:
        wrong = np.argwhere((ids < least) | (ids >= self.size))
        if len(wrong):
            allowed = f"0 to {self.size - 1}" + (", or -1 for none" if least < 0 else "")
            raise InputError(
                f"{name}: {len(wrong)} of {ids.size} ids are not positions in the gallery ({allowed}); "
                f"the first is {ids[tuple(wrong[0])]}, in row {wrong[0][0]}"
            )

    @cached_property
    def shards(self) -> tuple[NDArray[Any], ...]:
        """The gallery's arrays, in order."""
        return (self.items,) if isinstance(self.items, np.ndarray) else tuple(self.items)

    @cached_property
    def gallery(self) -> Any:
        """What `select_zones` takes as items."""
        filled = tuple(shard for shard in self.shards if len(shard)) or self.shards[:1]
        return filled[0] if len(filled) == 1 else filled

    @property
    def size(self) -> int:
        """N, the positions of the gallery."""
        return sum(map(len, self.shards))

    @property
    def by_id(self) -> bool:
        """Whether `targets` are positions, not scores."""
        return self.targets.dtype == np.int64

    @cached_property
    def screen(self) -> Screen | None:
        """The gallery's 8-bit copy, where it makes mining faster."""
        shards = shards_of(self.gallery)
        fits = screen_bytes(shards) <= SCREEN_BYTES and shards[0].shape[2] <= MAX_WIDTH
        if self.resolved_backend != "cpu" or not fits or len(self.queries) < LEAST_SCREENED_QUERIES or not screens_panels():
            return None
        from . import cpu  # not without its kernels

        field = cpu.rank_field(self.zones.hi, self.size) if self.zones.bounds == "rank" else 0
        return Screen.build(self.gallery, threads=self.threads, lists=False, prefix=False) if cpu.screening_pays(field, shards) else None

    @cached_property
    def applied_zones(self) -> ZoneSpec:
        """`zones`, or where they are pooled, the absolute ones that they come to over all queries."""
        targets: Any = np.ascontiguousarray(self.targets)
        return resolve_pooled(self.zones, self.queries, self.gallery, anchor=targets, exclude=self._hidden(0, len(self.queries)))

    def _hidden(self, start: int, stop: int) -> list[I64] | None:
        """What is no candidate of the queries from `start` to `stop`: what `exclude` says and the target itself."""
        hidden: list[Any] = [] if self.exclude is None else [self.exclude[start:stop]]
        if self.by_id:
            hidden.append(self.targets[start:stop, None])
        return [ids[ids >= 0] for ids in np.concatenate(hidden, axis=1)] if hidden else None

    @cached_property
    def resolved_backend(self) -> str:
        """What will run."""
        return select_zones(self.queries[:0], self.gallery, backend=self.backend).backend

    def rows(self, start: int, stop: int) -> MinedNegatives:
        """Mine for the queries from `start` to `stop`."""
        rows = slice(start, stop)
        found = select_zones(
            np.ascontiguousarray(self.queries[rows]),
            self.gallery,
            anchor=np.ascontiguousarray(self.targets[rows]),
            zones=self.applied_zones,
            picks=self.picks,
            counts=True,
            exclude=self._hidden(start, stop),
            first_query=start,
            screen=self.screen,
            threads=self.threads,
            backend=self.backend,
        )
        arrays = {name: getattr(found, name) for name in ARRAYS}
        return MinedNegatives(**arrays, backend=found.backend)


def mine_negatives(
    queries: F32,
    items: NDArray[Any] | Sequence[NDArray[Any]],
    targets: I64 | F32,
    *,
    zones: ZoneSpec,
    picks: int,
    exclude: I64 | None = None,
    block: int = QUERY_BLOCK,
    threads: int = 0,
    backend: Backend = "auto",
    progress: Progress = no_progress,
    rows: range | None = None,
) -> MinedNegatives:
    """Mid-zone picks of Δ = s(q, target) - s(q, i) for every query over the whole gallery.

    queries: (T, D) float32, C-contiguous; may be memory-mapped.
    items: the gallery, (N, D) or (N, M, D) float32 or float16, or its shards in order: positions count through.
    targets: int64 (T,) positions of the targets, which are then no candidates; or float32 (T,) scores to take Δ from.
    zones: pooled ones are resolved once, over all queries, whatever `rows` are mined.
    exclude: int64 (T, E) more positions that are no candidates (the references), padded with -1.
    block: queries per pass over the gallery. Neither it, nor the shards, nor `threads` (0: one per processor) change what is
        picked from given scores: draws depend on the seed of `zones`, the query's row and the item's position alone.
    rows: mine for these consecutive queries alone; the result has a row for each, the same as in that of all.

    Raises InputError for arguments that do not fit, BackendError as `select_zones` does. `mine_to_folder` does the same to a
    folder, and resumes.
    """
    job = MiningJob(
        queries=queries, items=items, targets=targets, zones=zones, picks=picks, exclude=exclude,
        block=block, threads=threads, backend=backend,
    )  # fmt: skip
    rows = range(len(queries)) if rows is None else rows
    if not 0 <= rows.start <= rows.stop <= len(queries) or rows.step != 1:
        raise InputError(f"rows={rows}: expected consecutive rows of the {len(queries)} queries")
    parts = []
    for start in range(rows.start, max(rows.stop, rows.start + 1), block):
        stop = min(start + block, rows.stop)
        parts.append(job.rows(start, stop))
        progress(stop - rows.start, len(rows))
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    return MinedNegatives(**arrays, backend=parts[0].backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningSummary:
    """Figures over all queries. `quantiles`: at `QUANTILES`, of what the queries have that have it."""

    queries: int
    full: int
    """Queries with all P picks."""
    empty: int
    """Queries without a pick."""
    quantiles: dict[str, tuple[float, ...]]


def summarise(mined: MinedNegatives) -> MiningSummary:
    """Zone sizes, bounds and Δ of the picks over the queries."""
    found = (np.asarray(mined.picks) >= 0).sum(axis=1)
    with np.errstate(invalid="ignore"):
        deltas = (mined.anchor_scores[:, None] - mined.pick_scores)[np.asarray(mined.picks) >= 0]
    columns = {
        **{name: mined.counts[:, zone] for zone, name in enumerate(("near", "mid", "easy"))},
        "picks": found,
        "lo": mined.lo,
        "hi": mined.hi,
        "target score": mined.anchor_scores,
        "Δ of picks": deltas,
    }
    finite = {name: values[np.isfinite(values)] for name, values in columns.items()}
    return MiningSummary(
        queries=len(found),
        full=int((found == mined.picks.shape[1]).sum()),
        empty=int((found == 0).sum()),
        quantiles={name: tuple(np.quantile(values, QUANTILES, method="lower").tolist()) for name, values in finite.items() if len(values)},
    )
