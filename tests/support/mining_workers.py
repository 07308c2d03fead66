"""A mining problem whose dot products are exact, and the process whose workers mine it and are killed
(tests/zones/test_mining.py, test_mined_folder.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support.dying import die_before_change
from support.fork_server import serve

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones.mining import ARRAYS, MinedNegatives, MiningJob, mine_negatives
from dqe_engine.zones.mining_folder import mine_to_folder

GALLERY, QUERIES, TOKENS, WIDTH, PICKS, BLOCK = 40, 23, 2, 8, 5, 7
ZONES = ZoneSpec(lo=0.0, hi=0.9, bounds="pooled", policy="uniform", seed=3)


def problem(seed: int = 0) -> dict[str, Any]:
    """Queries, items, targets and exclude. Values are multiples of 1/8: every inner product is exact."""
    rng = np.random.default_rng(seed)
    queries = (rng.integers(-8, 9, (QUERIES, WIDTH)) / 8).astype(np.float32)
    items = (rng.integers(-8, 9, (GALLERY, TOKENS, WIDTH)) / 8).astype(np.float32)
    targets, references = rng.integers(0, GALLERY, (2, QUERIES))
    references[:3] = targets[:3]
    return {"queries": queries, "items": items, "targets": targets, "exclude": references[:, None]}


def job(*, lo: float = ZONES.lo) -> MiningJob:
    zones = ZoneSpec(lo=lo, hi=ZONES.hi, bounds=ZONES.bounds, policy=ZONES.policy, seed=ZONES.seed)
    return MiningJob(**problem(), zones=zones, picks=PICKS, block=BLOCK, threads=1)


def mine(*, zones: ZoneSpec = ZONES, picks: int = PICKS, **options: Any) -> MinedNegatives:
    inputs = problem()
    inputs |= {name: options.pop(name) for name in tuple(inputs) if name in options}
    return mine_negatives(inputs.pop("queries"), inputs.pop("items"), inputs.pop("targets"), zones=zones, picks=picks, **inputs, **options)


def assert_same(a: MinedNegatives, b: MinedNegatives) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


def mine_and_die(out: str, die_before: int, lo: float, force: bool) -> None:
    """Mine to a folder, and die by SIGKILL just before the n-th change of what is on the disk."""
    die_before_change(die_before)
    mine_to_folder(Path(out), job(lo=lo), force=force)


if __name__ == "__main__":
    print("ready", flush=True)
    serve({"mine_and_die": mine_and_die})
