"""A finished folder of mined negatives: what it says of itself, and its arrays.

OUT/
    mined.json      what was mined from which inputs (their SHA-256), with which bounds; sizes and SHA-256 of the arrays
    picks.npy, pick_scores.npy, counts.npy, lo.npy, hi.npy, anchor_scores.npy
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine.array_files import open_array
from dqe_engine.contracts.manifest import FileEntry
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.files import recover_directory, sha256_of

from .mining import ARRAYS, MinedNegatives
from .mining_plan import SCHEMA_VERSION, MiningPlan, lifted

MANIFEST_FILE = "mined.json"


class MiningManifest(Versioned, frozen=True, kw_only=True):
    """`resolved`: the absolute zones that the plan's pooled ones came to; else None."""

    kind: Literal["mined-negatives"] = "mined-negatives"
    schema_version: int = SCHEMA_VERSION
    plan: MiningPlan
    resolved: ZoneSpec | None = None
    files: tuple[FileEntry, ...]

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        return lifted(data)


def read_mined(folder: Path, *, verify: bool = True) -> tuple[MiningManifest, MinedNegatives]:
    """A finished folder; its arrays are memory-mapped. Raises InputError for one that is missing or damaged.

    `verify`: hold every file against its SHA-256, which reads them all.
    """
    folder = named(folder)
    path = folder / MANIFEST_FILE
    with contextlib.suppress(OSError):
        recover_directory(folder)
    try:
        manifest = read_document(MiningManifest, path, remedy="mine again with --force", error=InputError)
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = f"; a run to it is unfinished, run dqe-mine again ({partial})" if (partial := partial_of(folder)).is_dir() else ""
        raise InputError(f"{folder}: no mined negatives here (no {MANIFEST_FILE}){hint}") from error
    if sorted(entry.path for entry in manifest.files) != sorted(f"{name}.npy" for name in ARRAYS):
        raise InputError(f"{path}: lists other files than those of mined negatives; mine again with --force")
    for entry in manifest.files:
        file = folder / entry.path
        if not file.is_file() or file.stat().st_size != entry.size or (verify and sha256_of(file) != entry.sha256):
            raise InputError(f"{file}: missing or damaged (its SHA-256 is not that in {MANIFEST_FILE}); mine again with --force")
    rows = layout(manifest.plan.picks)
    arrays = {}
    for name in ARRAYS:
        arrays[name] = _read_array(folder / f"{name}.npy", (manifest.plan.queries, *rows[name].shape), rows[name].base)
    return manifest, MinedNegatives(**arrays, backend=manifest.plan.backend)


def layout(picks: int) -> dict[str, np.dtype[Any]]:
    """Dtype of one query's row of each array."""
    return {
        "picks": np.dtype(("<i8", (picks,))),
        "pick_scores": np.dtype(("<f4", (picks,))),
        "counts": np.dtype(("<i8", (3,))),
        "lo": np.dtype("<f4"),
        "hi": np.dtype("<f4"),
        "anchor_scores": np.dtype("<f4"),
    }


def _read_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    array = open_array(path, "mine again with --force")
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{path}: {array.dtype} of shape {array.shape}, expected {dtype} {shape}; mine again with --force")
    return np.asarray(array)


def named(folder: Path) -> Path:
    """The folder by a path that ends in its name, which "." and ".." do not."""
    folder = Path(folder)
    return folder if folder.name and folder.name != ".." else folder.resolve()


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")
