"""A mining job of `.npy` files, as `dqe-data encode` writes them: mapped, not loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.array_files import open_array
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

from .mining import QUERY_BLOCK, MiningJob
from .select import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningFiles:
    """Where a job's arrays are.

    queries: (T, D) float32.
    gallery: shards in order, (N, D) or (N, M, D) float32 or float16. A folder among them stands for its `.npy` files in natural order:
        2 before 10.
    targets: (T,) integers, positions in the gallery; or with `targets_are_scores` float32, what Δ starts from.
    exclude: (T, E) integers, padded with -1.
    """

    queries: Path
    gallery: Sequence[Path]
    targets: Path
    targets_are_scores: bool = False
    exclude: Path | None = None


def gallery_within(folder: Path) -> Path:
    """The gallery of a folder of inputs: its subfolder of shards, or else its one file."""
    return shards if (shards := folder / "gallery").is_dir() else folder / "gallery.npy"


def exclude_within(folder: Path) -> Path | None:
    """The exclusions of a folder of inputs, which need not be there."""
    return path if (path := folder / "exclude.npy").exists() else None


def open_job(
    files: MiningFiles, *, zones: ZoneSpec, picks: int, block: int = QUERY_BLOCK, threads: int = 0, backend: Backend = "auto"
) -> MiningJob:
    """The job whose arrays are in `files`; for the options see `mine_negatives`. Raises InputError naming the file that does not fit."""
    queries = _mapped(files.queries, ("float32",), (2,))
    shards = [(path, _mapped(path, ("float32", "float16"), (2, 3))) for path in _shards(files.gallery)]
    for path, shard in shards:
        if shard.shape[-1] != queries.shape[1]:
            raise InputError(f"{path}: shape {shard.shape}, D={shard.shape[-1]}; the queries have D={queries.shape[1]}")
        if (shard.dtype, shard.shape[1:]) != (shards[0][1].dtype, shards[0][1].shape[1:]):
            first = shards[0][1]
            raise InputError(f"{path}: {shard.dtype} {shard.shape[1:]} per item, but {shards[0][0]} has {first.dtype} {first.shape[1:]}")
    if files.targets_are_scores:
        targets = _mapped(files.targets, ("float32",), (1,))
    else:
        targets = _mapped(files.targets, ("integers",), (1,)).astype("int64")
    exclude = None if files.exclude is None else _mapped(files.exclude, ("integers",), (2,)).astype("int64")
    return MiningJob(
        queries=queries, items=[shard for _, shard in shards], targets=targets, zones=zones, picks=picks, exclude=exclude,
        block=block, threads=threads, backend=backend,
    )  # fmt: skip


def _shards(given: Sequence[Path]) -> list[Path]:
    """The gallery's files, in order."""
    paths = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        inside = sorted(path.glob("*.npy"), key=_natural)
        if not inside:
            raise InputError(f"{path}: no .npy files in this folder")
        paths += inside
    return paths


def _natural(file: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file.name)]


def _mapped(path: Path, dtypes: tuple[str, ...], ranks: tuple[int, ...]) -> NDArray[Any]:
    """The array in a file, mapped read-only."""
    array = open_array(path)
    kind = "integers" if array.dtype.kind in "iu" else array.dtype
    if kind not in dtypes:
        raise InputError(f"{path}: dtype {array.dtype}, expected {' or '.join(dtypes)}; convert with astype and save again")
    if array.ndim not in ranks:
        raise InputError(f"{path}: shape {array.shape}, expected {' or '.join(map(str, ranks))} dimensions")
    if not array.flags.c_contiguous:
        raise InputError(f"{path}: in Fortran order; save np.ascontiguousarray of it")
    return np.asarray(array)
