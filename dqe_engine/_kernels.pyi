"""Types of the compiled kernels (cpp_ext/bindings*.cpp). Arrays must fit exactly: what does not is a TypeError, never a copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Coded = tuple[NDArray[np.uint8], F32, F32, F32]

MAX_ROW_QUERIES: int
"""Up to so many queries are scored row by row, more in panels."""

class Codes:
    """The codes of all shards; this and the next two are made once for many sweeps."""

    def __init__(self, shards: Sequence[Coded]) -> None: ...

class Lists:
    def __init__(
        self,
        covered: int,
        codes: NDArray[np.uint8],
        scales: F32,
        errors: F32,
        norms: F32,
        longest: F32,
        widest: F32,
        starts: I64,
        rows: NDArray[np.uint32],
        cosines: NDArray[np.uint16],
    ) -> None: ...

class Prefixes:
    def __init__(self, covered: int, axes: F32, blocks: NDArray[np.uint8]) -> None: ...

def sweep(
    queries: F32,
    shards: Sequence[NDArray[Any]],
    coded: Codes | None,
    offsets: I64,
    excluded: I64,
    allowed: NDArray[np.uint64] | None,
    *,
    query_rows: I64,
    zoning: int,
    anchor_is_best: bool,
    anchor_ids: I64 | None,
    lo_of_all: float,
    hi_of_all: float,
    policy: int,
    temperature: float,
    seed: int,
    sample: int,
    field: int,
    by_rows: bool,
    threads: int,
    instruction_set: str,
    scores: F32,
    ids: I64,
    anchor: F32,
    lo: F32,
    hi: F32,
    counts: I64,
    pick_keys: F64,
    picks: I64,
    pick_scores: F32,
    status: NDArray[np.int8],
    lists: Lists | None = None,
    most_listed: int = 0,
    prefix: Prefixes | None = None,
) -> int: ...
def gather_directions(shards: Sequence[NDArray[Any]], rows: I64, directions: F32, known: NDArray[np.uint8], threads: int) -> None: ...
def project(points: F32, axes: F32, along: F32, threads: int) -> None: ...
def mean_directions(points: F32, group_of: NDArray[np.uint32], directions: F32, threads: int) -> None: ...
def cluster(
    points: F32, begins: I64, offsets: I64, most: int, rounds: int, centres: F32, nearest: NDArray[np.uint32], threads: int
) -> None: ...
def assign_tokens(tokens: F32, axes: F32, roots: F32, leaves: F32, offsets: I64, assigned: NDArray[np.uint32], threads: int) -> None: ...
def fill_lists(
    shards: Sequence[NDArray[Any]],
    axes: F32,
    roots: F32,
    leaves: F32,
    offsets: I64,
    directions: F32,
    longest: F32,
    widest: F32,
    starts: I64,
    rows: NDArray[np.uint32],
    cosines: NDArray[np.uint16],
    threads: int,
) -> None: ...
def fill_prefix(
    shards: Sequence[NDArray[Any]], axes: F32, blocks: NDArray[np.uint8], threads: int, order: NDArray[np.uint32] | None = None
) -> None: ...
def encode(items: NDArray[Any], codes: NDArray[np.uint8], scales: F32, errors: F32, norms: F32, threads: int) -> None: ...
def instruction_sets() -> list[str]: ...
def screened_queries(instruction_set: str) -> int: ...
def multiply_add_rate(threads: int, instruction_set: str = "") -> float: ...
