"""Types of the compiled kernels (cpp_ext/bindings.cpp). Arrays must fit exactly: what does not is a TypeError, never a copy."""

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

def update_top_k(tile: F32, first_item: int, scores: F32, ids: I64, threads: int = 0) -> None: ...
def sort_top_k(scores: F32, ids: I64, threads: int = 0) -> None: ...
def update_zones(
    tile: F32,
    first_item: int,
    first_query: int,
    anchor: F32,
    lo: F32,
    hi: F32,
    policy: int,
    temperature: float,
    seed: int,
    counts: I64,
    pick_keys: F64,
    pick_ids: I64,
    pick_scores: F32,
    threads: int = 0,
) -> None: ...
def sort_picks(keys: F64, ids: I64, scores: F32, threads: int = 0) -> None: ...
def update_ranking(tile: F32, buffer: F32, fill: I64, threshold: F32, valid: I64, threads: int = 0) -> None: ...
def score_at_rank(buffer: F32, fill: I64, threshold: F32, valid: I64, quantile: float, scores: F32, threads: int = 0) -> None: ...
