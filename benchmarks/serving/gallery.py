"""Large galleries: the search and the whole query against their size, and the resident memory of an index."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.engine import RetrievalEngine
from dqe_engine.index import GalleryIndex
from dqe_engine.zones.arrays import F32

from ..harness import SETTLE_SECONDS, AnswerMismatchError
from ..isolated import in_own_process, return_freed
from ..machine import available_bytes
from ..resident import status_bytes
from ..statistics import band, percentiles
from . import searchers as by
from .cases import EAGER, gpu_not_measured
from .checks import Answer, compare
from .setting import Reference, Setting, workload

Storage = Literal["f32", "f16"]
STORAGES: tuple[tuple[Storage, bool], ...] = (("f32", False), ("f32", True), ("f16", False), ("f16", True))
_CHUNK = 100_000
_NOISE = 0.3
"""Norm of what is added to a token before it is scaled to unit norm."""
_CHECKED = 4


@dataclass(frozen=True, slots=True)
class Series:
    """Galleries of growing size whose items have `tokens` tokens."""

    tokens: int
    sizes: tuple[int, ...]
    queries: int
    blocks: int


def gallery(
    setting: Setting, *, series: tuple[Series, ...], resident_items: int, step: Callable[[str], None], reached: Callable[[float], None]
) -> dict[str, Any]:
    """Each series and each memory figure in a process of its own, so that none sees what another left."""
    rows, resident = [], []
    for number, one in enumerate(series):
        step(f"galleries of {one.tokens} tokens an item, up to {max(one.sizes):,} items")
        reached(number / (len(series) + 1))
        rows += in_own_process(measure_series, setting, one)
    cases = [(tokens, storage) for tokens in dict.fromkeys(one.tokens for one in series) for storage in indexed()]
    for number, (tokens, storage) in enumerate(cases):
        step(f"memory of {resident_items:,} items, {tokens} tokens, {storage}")
        reached((len(series) + number / len(cases)) / (len(series) + 1))
        resident += measure_resident(setting, resident_items, tokens, storage)
    return {"rows": rows, "resident": resident, "noise": _NOISE, "missing": gpu_not_measured()}


def indexed() -> tuple[Storage, ...]:
    """The storages that need an index each; a screen is made for either."""
    return tuple(dict.fromkeys(storage for storage, _ in STORAGES))


def tokens_of(setting: Setting) -> int:
    """M of the model."""
    return Bundle.load(setting.bundle, verify=False).sizes.target_tokens


def name_of(storage: Storage, screened: bool) -> str:
    return f"ours {storage}{' screened' if screened else ''}"


def synthetic(setting: Setting, items: int, tokens: int) -> F32:
    """(items, tokens, D) around the tokens of the real gallery: `tokens` is its own M, or 1 for the mean of an item's tokens."""
    real = np.load(setting.targets_file)
    if tokens == 1:
        real = real.mean(axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    out = np.empty((items, *real.shape[1:]), np.float32)
    for start in range(0, items, _CHUNK):
        part = out[start : start + _CHUNK]
        part[:] = real[rng.integers(0, len(real), len(part))]
        part += rng.standard_normal(part.shape, np.float32) * (_NOISE / np.sqrt(part.shape[2]))
        part /= np.linalg.norm(part, axis=2, keepdims=True)
    return out


def measure_series(setting: Setting, series: Series) -> list[dict[str, Any]]:
    """Single queries with an uploaded reference against each size, all ways in turns; answers compared first."""
    bundle = Bundle.load(setting.bundle)
    width = bundle.sizes.embedding_dim
    rows: list[dict[str, Any]] = []
    room = 0.8 * available_bytes()
    sizes = [size for size in series.sizes if bytes_needed(size, series.tokens, width) <= room]
    items = synthetic(setting, max(sizes, default=0), series.tokens)
    ids = [f"{at:08d}" for at in range(len(items))]
    indexes = {storage: new_index(bundle, series.tokens, storage) for storage in indexed()}
    engines = {storage: RetrievalEngine.load(setting.bundle, provider="cpu", threads=setting.threads, kept_bytes=0) for storage in indexes}
    for size in sizes:
        for storage, index in indexes.items():
            for start in range(len(index), size, _CHUNK):
                stop = min(start + _CHUNK, size)
                index.add(ids[start:stop], items[start:stop])
            engines[storage].attach(index)
        peer = by.TorchSearcher(by.TorchFiles.of(setting), gallery=(ids[:size], items[:size]))
        found = _measure(setting, series, engines, peer, items[:size], ids)
        rows += [{"items": size, "tokens": series.tokens, "width": width, "status": "ok", **row} for row in found]
    rows += [
        {"items": size, "tokens": series.tokens, "width": width, "status": "skipped: memory"} for size in series.sizes if size not in sizes
    ]
    return rows


def bytes_needed(items: int, tokens: int, width: int) -> int:
    """Of a size of a series: vectors once, an index in each storage that was doubled while it grew, both screens, scores, ids."""
    return items * (tokens * width * (4 + 2 * (4 + 2) + 2) + 16 * tokens + 600)


def new_index(bundle: Bundle, tokens: int, storage: Storage) -> GalleryIndex:
    sizes = bundle.sizes
    return GalleryIndex(
        model_hash=bundle.model_hash, target_shape=(tokens, sizes.embedding_dim), image_shape=(sizes.image_tokens, sizes.vision_width),
        storage=storage,
    )  # fmt: skip


def _measure(
    setting: Setting, series: Series, engines: dict[Storage, RetrievalEngine], peer: by.TorchSearcher, items: F32, ids: list[str]
) -> list[dict[str, Any]]:
    ways: dict[str, tuple[by.Searcher, GalleryIndex | None, bool]] = {EAGER: (peer, None, False)}
    for storage, screened in STORAGES:
        served = engines[storage]
        ways[name_of(storage, screened)] = (by.EngineSearcher(served), served.index, screened)
    work = workload(setting)
    truth, positions = _truth(setting, engines["f32"], items), {id: at for at, id in enumerate(ids[: len(items)])}
    overlaps: dict[str, float] = {}
    for name, (searcher, index, screened) in ways.items():
        if index is not None:
            index.screened = screened
        rankings = [searcher.search(*work.batch("uploaded", at, 1), setting.k)[0] for at in range(len(truth))]
        agreement = compare(Answer(rankings, "f16" not in name), positions, truth, setting.k)
        if not agreement.ok:
            raise AnswerMismatchError(f"{len(items):,} items of {series.tokens} tokens: {name}: {agreement.detail}")
        overlaps[name] = agreement.same_ids
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in ways}
    for block in range(series.blocks):
        for samples in taken.values():
            samples.append([])
        for number in range(series.queries):
            query = work.batch("uploaded", block * series.queries + number, 1)
            for name, (searcher, index, screened) in ways.items():
                if index is not None:
                    index.screened = screened
                time.sleep(SETTLE_SECONDS)
                taken[name][-1].append(timed_search(searcher, query, setting.k))
    return [{"name": name, "same_ids": overlaps[name], **_figures(blocks)} for name, blocks in taken.items()]


def timed_search(searcher: by.Searcher, query: tuple[list[Reference], list[str]], k: int) -> tuple[float, float]:
    """Milliseconds of the whole call and of its search."""
    started = time.perf_counter()
    searcher.search(*query, k)
    return (time.perf_counter() - started) * 1e3, searcher.timings_ms["search"]


def _truth(setting: Setting, served: RetrievalEngine, items: F32) -> NDArray[np.float64]:
    """(Q, N) scores of the first queries, in blocks of items."""
    count = min(_CHECKED, setting.pool)
    queries = by.encode_by_engine(served, *workload(setting).batch("uploaded", 0, count)).astype(np.float64)
    scores = np.empty((count, len(items)))
    for start in range(0, len(items), _CHUNK):
        part = items[start : start + _CHUNK].astype(np.float64)
        scores[:, start : start + _CHUNK] = np.stack([(part @ query).max(axis=1) for query in queries])
    return scores


def _figures(blocks: list[list[tuple[float, float]]]) -> dict[str, Any]:
    out: dict[str, Any] = {"blocks": list(map(len, blocks))}
    for column, name in enumerate(("total", "search")):
        samples = [sample[column] for block in blocks for sample in block]
        figures = percentiles(samples)
        medians = [float(np.median([sample[column] for sample in block])) for block in blocks]
        out[f"{name}_ms"] = figures | {"band": band(medians, around=figures["p50"]), "samples": [round(s, 4) for s in samples]}
    return out


def measure_resident(setting: Setting, items: int, tokens: int, storage: Storage) -> list[dict[str, Any]]:
    """Bytes that a saved index of `items` adds to a process that searches it, without and with a screen: mapped pages (which the
    system can drop) and others."""
    folder = setting.work / "resident"
    try:
        in_own_process(_write_index, setting, folder, items, tokens, storage)
        return [
            {
                "name": name_of(storage, screened),
                "items": items,
                "tokens": tokens,
                **in_own_process(_resident_of, setting, folder, screened),
            }
            for screened in (False, True)
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_index(setting: Setting, folder: Path, items: int, tokens: int, storage: Storage) -> None:
    index = new_index(Bundle.load(setting.bundle), tokens, storage)
    index.add([f"{at:08d}" for at in range(items)], synthetic(setting, items, tokens))
    index.save(folder, overwrite=True)


def _resident_of(setting: Setting, folder: Path, screened: bool) -> dict[str, int]:
    served = RetrievalEngine.load(setting.bundle, provider="cpu", threads=setting.threads, kept_bytes=0)
    served.load_index(setting.index_of("f32"), screened=screened)
    query = workload(setting).batch("uploaded", 0, 1)
    searcher = by.EngineSearcher(served)
    searcher.search(*query, setting.k)
    served.new_index()
    gc.collect()
    return_freed()
    before = status_bytes("VmRSS"), status_bytes("RssAnon")
    served.load_index(folder, screened=screened)
    for _ in range(3):
        searcher.search(*query, setting.k)
    gc.collect()
    return_freed()
    resident, own = (max(status_bytes(name) - was, 0) for name, was in zip(("VmRSS", "RssAnon"), before, strict=True))
    return {"resident_bytes": resident, "anonymous_bytes": own}
