"""The zone kernels: what is built, what this processor runs, and whether each selects what the NumPy reference selects."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import Screen, ZoneSelection, reference
from dqe_engine.zones.request import validated

from .findings import NO_DEVICE, Context, Finding, Steps, Trying

_REINSTALL = "build them for this machine: pip install --force-reinstall --no-deps ."
_BUILD_CUDA = "for an NVIDIA GPU, with nvcc on PATH: pip install -C cmake.define.DQE_CUDA=ON ."
_WRONG = "do not use it: its results are wrong; report this with the output of dqe-doctor --json"
ITEMS, TOKENS, WIDTH = 1000, 2, 72
QUERIES = (2, 9)
"""Few queries are scored row by row, more in panels."""
CUDA_QUERIES = (2, 70)
"""A device takes up to 16 queries in one tile, and more in tiles of 64; a Hopper's own kernels take tiles of 128."""
OPTIONS: dict[str, Any] = {
    "k": 7,
    "zones": ZoneSpec(lo=40, hi=90, policy="softmax", temperature=20.0, seed=3),
    "picks": 5,
    "counts": True,
}
COMPARED = ("ids", "scores", "counts", "picks", "pick_scores")
TOP_K = {"k": OPTIONS["k"]}
"""Without zones a device may take other kernels."""


def probe(context: Context) -> Steps:
    yield from _cpu(context)
    yield from _cuda(context.devices)


def problem(batch: int) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Queries (batch, WIDTH) float32 and items (ITEMS, TOKENS, WIDTH) float16, of small whole numbers.

    Every dot product is exact in any order of additions, so backends must agree to the bit, and many scores tie.
    """
    rng = np.random.default_rng(batch)
    queries = rng.integers(-3, 4, (batch, WIDTH)).astype(np.float32)
    return queries, rng.integers(-3, 4, (ITEMS, TOKENS, WIDTH)).astype(np.float16)


def expected(batch: int) -> ZoneSelection:
    queries, items = problem(batch)
    return reference.select(validated(queries, items, anchor=None, exclude=None, **OPTIONS))


def difference(found: ZoneSelection, wanted: ZoneSelection) -> str | None:
    """The first thing in which two selections differ, None for none. Arrays are NumPy's."""
    for field in COMPARED:
        ours, theirs = getattr(found, field), getattr(wanted, field)
        if ours is None:  # not asked for
            continue
        if ours.shape != theirs.shape:
            return f"{field} have shape {ours.shape}, expected {theirs.shape}"
        if len(rows := np.nonzero((ours != theirs).any(axis=1))[0]):
            row = int(rows[0])
            return f"{field} of query {row} of {len(ours)} are {ours[row].tolist()}, expected {theirs[row].tolist()}"
    return None


def probe_cpu_sets(context: Context) -> Steps:
    """Which of the CPU's kernel sets run here, without trying them."""
    yield Trying("CPU kernels", _REINSTALL)
    if find_spec("dqe_engine._kernels") is None:
        found = "not built: NumPy selects instead, slowly and with all scores in memory"
        yield Finding("CPU kernels", "not installed", found, _REINSTALL)
        return
    from dqe_engine import _kernels

    runnable = _kernels.instruction_sets()
    facts = {"instruction_sets": runnable, "chosen": runnable[0]}
    yield Finding("CPU kernels", "ok", f"built; this processor runs {', '.join(runnable)}; {runnable[0]} is chosen", facts=facts)


def _cpu(context: Context) -> Steps:
    runnable: list[str] = []
    for step in probe_cpu_sets(context):
        if isinstance(step, Finding):
            runnable = step.facts.get("instruction_sets", [])
        yield step
    for instruction_set in runnable:
        yield Trying(f"CPU, {instruction_set}", _REINSTALL)
        yield _agreement(f"CPU, {instruction_set}", _cpu_difference(instruction_set))


def _cpu_difference(instruction_set: str) -> str | None:
    """Float32 and float16 items, with and without a screen."""
    from dqe_engine.zones import cpu

    for batch in QUERIES:
        wanted = expected(batch)
        queries, halves = problem(batch)
        for items in (halves, halves.astype(np.float32)):
            for screen in (None, Screen.build(items, threads=1)):
                request = validated(queries, items, anchor=None, exclude=None, screen=screen, **OPTIONS)
                found = cpu.select(request, threads=2, instruction_set=instruction_set)
                if wrong := difference(found, wanted):
                    return f"{items.dtype} items{', screened' if screen else ''}: {wrong}"
    return None


def _cuda(devices: int) -> Steps:
    yield Trying("CUDA kernels", _BUILD_CUDA)
    if find_spec("dqe_engine._kernels_cuda") is None:
        yield Finding("CUDA kernels", "not installed", "not built", _BUILD_CUDA)
        return
    from dqe_engine import _kernels_cuda  # only in builds with CUDA

    if _kernels_cuda.device_count() == 0:
        if devices:
            remedy = "update the NVIDIA driver, or build with the CUDA version that it supports (see driver)"
            yield Finding("CUDA kernels", "broken", f"built, but they see none of {devices} devices", remedy)
        else:
            yield Finding(
                "CUDA kernels",
                "not available",
                "built; there is no CUDA device to run on",
                NO_DEVICE,
            )
        return
    wrong, architectures = _cuda_difference()
    how = ", ".join(f"{what} by kernels for {' and '.join(sorted(names))}" for what, names in architectures.items())
    yield _agreement("CUDA kernels", wrong, f"; {how}")


def _cuda_difference() -> tuple[str | None, dict[str, set[str]]]:
    """What is wrong, and the architectures of the kernels that searched for the best, and for zones."""
    from dqe_engine.device_arrays import CudaMemory
    from dqe_engine.zones import cuda

    architectures: dict[str, set[str]] = {"top-k": set(), "zones": set()}
    with CudaMemory.open() as memory:
        for batch in CUDA_QUERIES:
            wanted = expected(batch)
            queries, halves = problem(batch)
            for items in (halves, halves.astype(np.float32)):
                index = cuda.Index(memory.upload(items))
                for options in (OPTIONS, TOP_K):
                    on_device = index.select(memory.upload(queries), **options)
                    arrays = {name: getattr(on_device, name) for name in COMPARED}
                    fields = {name: None if array is None else memory.download(array) for name, array in arrays.items()}
                    others = dict.fromkeys(("lo", "hi", "anchor_scores"))
                    if wrong := difference(ZoneSelection(**fields, **others, backend="cuda"), wanted):  # type: ignore[arg-type]
                        return f"{items.dtype} items: {wrong}", architectures
                    zones = options.get("zones")
                    architectures["zones" if zones else "top-k"].add(index.architecture(batch, zones=zones))
    return None, architectures


def _agreement(name: str, wrong: str | None, how: str = "") -> Finding:
    if wrong is None:
        return Finding(name, "ok", f"selects exactly what NumPy selects{how}", facts={"agrees": True})
    return Finding(name, "broken", wrong, _WRONG, {"agrees": False})
