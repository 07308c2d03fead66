"""`select_zones`: the public entry to Δ-score zone selection and exact MaxSim search."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

from . import compiled
from .arrays import F32, I64, DeviceArray, Exclusions, Items
from .bitmaps import U64
from .pooled import resolve_pooled
from .request import ZoneSelection, validated
from .screen import Screen

Backend = Literal["auto", "cpu", "reference", "cuda"]


def select_zones(
    queries: F32 | DeviceArray,
    items: Items | DeviceArray,
    *,
    k: int = 0,
    anchor: I64 | F32 | DeviceArray | None = None,
    zones: ZoneSpec | None = None,
    picks: int = 0,
    counts: bool = False,
    exclude: Exclusions | None = None,
    allowed: U64 | None = None,
    first_query: int = 0,
    screen: Screen | None = None,
    threads: int = 0,
    stream: int = 0,
    workspace: DeviceArray | None = None,
    backend: Backend = "auto",
) -> ZoneSelection:
    """Top-k, zone counts and mid-zone picks of each query over all items, in one sweep.

    Arrays are NumPy's, or all on one CUDA device and of any framework that speaks DLPack: then the results are DLPack arrays
    on that device (`torch.from_dlpack(result.ids)`), and `dqe_engine.zones.cuda.select` says what differs.

    queries: (B, D) float32, C-contiguous.
    items: (N, D) or (N, M, D), float32 or float16, C-contiguous; score s(b, i) = max over m of <q_b, t_im>, higher is
        better. Other dtypes and strided arrays are refused, never copied. Read-only and memory-mapped arrays are fine.
        Or a sequence of such arrays: the shards of one gallery, whose positions count through.
    k: how many of the best to return; 0 for none.
    zones: bounds and pick policy on Δ = anchor - s (float32); needed by `anchor`, `picks` and `counts`. Pooled bounds are read
        from all queries of the call (`resolve_pooled`): for a batch in blocks, resolve them for the batch and pass what comes back.
        Ranks are each query's own: p means the Δ at rank floor(p * (n - 1)) of its n candidates, best first.
    anchor: None for the query's own best candidate; int64 (B,) item positions (the target: its Δ is 0, it is excluded
        only if `exclude` says so); float32 (B,) scores.
    picks: P items per query out of the mid zone, the top P of the policy's key. Draws depend on the seed, the query's row
        and the item's position only: not on tiling, threads or backend.
    first_query: if a batch is passed in blocks, the number of this block's first row in it; picks are then those of the whole batch.
    exclude: per query, item positions that are no candidates: they neither rank nor count. An excluded item may be
        the anchor. A sequence of B sequences, or an integer array (B, E). For few items per query; `allowed` is for many.
    allowed: uint64 (W,) for all queries, or (B, W), W = ceil(N / 64): bit i % 64 of word i // 64 says whether item i may be a
        candidate. Results are those of a gallery without the other items, except that positions, and with them the draws, stay as they are.
        A search takes about as long as without, or less. On the host.
    screen: `Screen.build(items)`. Bounds from its 8-bit codes rule out most items, which are then not read in full: a few queries cost
        a quarter of the memory traffic, and the result is as exact as without. Used if it gains (`rescored` in the result is then a
        number): up to 4 queries, and more where the processor has 8-bit dot products (AVX-512 VNNI).
    threads: 0 for one per processor. No result depends on it.
    stream, workspace: CUDA alone: the handle of the caller's stream, and device memory to work in.
    backend: "cpu" the compiled kernel, "reference" NumPy, "cuda" for arrays on a device; "auto": "cuda" for these, else the
        compiled kernel where it is built. The result says which ran.

    A NaN score or Δ is in no zone, and a NaN score never ranks. Backends agree up to the rounding of the dot products,
    and exactly given equal scores.

    Raises InputError for arguments that do not fit, BackendError for a backend that this installation does not have.
    """
    if threads < 0:
        raise InputError(f"threads={threads}: expected 0 or more")
    options: Any = {
        "k": k,
        "anchor": anchor,
        "zones": zones,
        "picks": picks,
        "counts": counts,
        "exclude": exclude,
        "allowed": allowed,
        "first_query": first_query,
    }
    where = _resolve(backend, queries)
    if where == "cuda":
        if screen is not None:
            raise InputError("screen: only for arrays on the CPU; leave it out for arrays on a device")
        from . import cuda

        return cuda.select(queries, items, **options, stream=stream, workspace=workspace)
    if stream or workspace is not None:
        raise InputError(f"stream and workspace are for arrays on a CUDA device; the queries are {type(queries).__name__}; leave both out")
    if zones is not None and zones.bounds == "pooled":
        options["zones"] = resolve_pooled(zones, queries, items, anchor=anchor, exclude=exclude, allowed=allowed)  # type: ignore[arg-type]
    request = validated(queries, items, **options, screen=screen)  # type: ignore[arg-type]  # a device array is refused by name
    if where == "cpu":
        from . import cpu

        return cpu.select(request, threads=threads)
    from . import reference

    return reference.select(request)


def _resolve(backend: str, queries: object) -> Literal["cpu", "reference", "cuda"]:
    on_device = not isinstance(queries, np.ndarray) and hasattr(queries, "__dlpack_device__")
    match backend:
        case "auto" if on_device:
            return "cuda"
        case "auto":
            return "cpu" if compiled.built() else "reference"
        case "cpu":
            compiled.kernels()
            return "cpu"
        case "reference" | "cuda":
            return backend
        case _:
            raise InputError(f"backend={backend!r}: expected 'auto', 'cpu', 'reference' or 'cuda'")
