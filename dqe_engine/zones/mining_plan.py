"""What identifies a mining run: the inputs by their SHA-256, the zones, and what else decides every byte of its result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

from .mining import MiningJob, Progress

SCHEMA_VERSION = 2
"""Of what holds a plan. Version 1 had its `kind` and `schema_version` in the plan."""
_READ_BYTES = 1 << 24
_MOST_PICKS = 1 << 24


class MiningPlan(Contract, frozen=True, kw_only=True):
    """What decides every byte of a result. A run is resumed only by the same plan."""

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


def lifted(data: dict[str, Any]) -> dict[str, Any]:
    """A document of version 1 that holds a plan, as one of version 2."""
    plan = data.get("plan")
    if "schema_version" in data or not isinstance(plan, dict):
        return data
    rest = {key: value for key, value in plan.items() if key not in ("kind", "schema_version")}
    return data | {"schema_version": plan.get("schema_version"), "plan": rest}


def make_plan(job: MiningJob, reading: Progress) -> MiningPlan:
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


def refuse_nonfinite(plan: MiningPlan) -> None:
    if plan.nonfinite:
        totals = {"gallery": plan.items}
        rows = ", ".join(f"{count} of {totals.get(name, plan.queries)} rows of {name}" for name, count in plan.nonfinite.items())
        raise InputError(f"NaN or infinities in {rows}; look at what made them, or go on with --allow-nan (they get no picks)")


def differences(ours: MiningPlan, theirs: MiningPlan) -> str:
    """What changed, in words."""
    inputs = [name for name in sorted({*ours.sha256, *theirs.sha256}) if ours.sha256.get(name) != theirs.sha256.get(name)]
    values = {
        **{name: (getattr(ours, name), getattr(theirs, name)) for name in ("picks", "backend")},
        **{name: (getattr(ours.zones, name), getattr(theirs.zones, name)) for name in ZoneSpec.__struct_fields__},
    }
    options = [f"{name} {then} (now {now})" for name, (now, then) in values.items() if now != then]
    return ", ".join([*(f"other {name}" for name in inputs), *options])
