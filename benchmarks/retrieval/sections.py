"""The sections of the benchmark: what each measures and what it records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dqe_engine.bundle import Bundle
from dqe_engine.zones.arrays import F32, I64
from dqe_training.data.public.detect import open_benchmark
from dqe_training.evaluation.benchmarks import evaluate_benchmark
from dqe_training.evaluation.rankers import open_ranker

from ..harness import Result, Rounds, Turns
from . import faiss_methods as by_faiss
from .cases import GalleryCase
from .figures import DEPTH, TOP, Outcomes, differences, outcomes, record
from .galleries import MIXED, NOISE, Gallery, among_distractors
from .methods import Method, Point, ours
from .setting import MODELS, PRECISIONS, REFERENCE, NotExportedError, Setting

PUBLIC = ("fashioniq", "cirr", "circo")
_SEARCHED = 64
"""Queries of a call where quality alone is measured."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is; `quick` is for seeing that it runs."""

    queries: int = 100_000
    items: int = 100_000_000
    batches: tuple[int, ...] = (1, 64)
    blocks: int = 3
    rounds: Rounds = field(default_factory=lambda: Rounds(minimum=3, maximum=12, seconds=0.03))
    galleries: tuple[int, ...] = (200_000, 1_000_000)
    asked: int = 256
    """Queries of the `pareto` section."""
    lists: int = 2048
    graph_rows: int = 250_000
    """HNSW over more rows is left out."""

    @classmethod
    def quick(cls) -> Sizes:
        rounds = Rounds(minimum=2, maximum=5, seconds=0.01)
        return cls(queries=96, items=1000, batches=(1, 32), blocks=1, rounds=rounds, galleries=(5_000,), asked=64, lists=64)

    @classmethod
    def full(cls) -> Sizes:
        return cls(graph_rows=10_000_000)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all sections share. `public`: folders of public datasets by name; `step` shows what is being done."""

    setting: Setting
    sizes: Sizes
    public: dict[str, Path]
    step: Callable[[str], None]


# -- models ----------------------------------------------------------------------------------------------------------------


def precision(bench: Bench) -> dict[str, Any]:
    """The evaluation queries by the checkpoint in PyTorch and by a bundle of each precision."""
    setting = bench.setting
    setting.check_same_model()
    exact = setting.embeddings(REFERENCE).ranked
    known = {REFERENCE: _outcomes(setting, exact, exact)}
    rows: list[dict[str, Any]] = [{"name": REFERENCE, "status": "ok", **record(known[REFERENCE])}]
    for model, kind in zip(MODELS[1:], PRECISIONS, strict=True):
        try:
            path = setting.bundle_of(kind)
            found = _outcomes(setting, setting.embeddings(model).ranked, exact)
        except NotExportedError as error:
            rows.append({"name": model, "status": f"not exported: {error}"})
            continue
        size = sum(file.size for file in Bundle.load(path).manifest.files if file.path.endswith((".onnx", ".data")))
        more = {"difference": differences(found, known[REFERENCE]), "graph_bytes": size}
        rows.append({"name": model, "status": "ok", **more, **record(found)})
    return {"queries": len(exact), "gallery": len(setting.evaluation.gallery), "rows": rows}


def _outcomes(setting: Setting, ranked: I64, exact: I64) -> Outcomes:
    return outcomes(ranked, setting.evaluation.target, exact, setting.evaluation.relevant)


# -- storage and approximation ---------------------------------------------------------------------------------------------


def storage_methods(k: int, tokens: int, width: int) -> list[Method]:
    """Over the dataset's own gallery, small enough for every way to be built."""
    all_tokens, code = tokens * (k + 1), width // 4

    def probed(*cells: int) -> tuple[tuple[int, int], ...]:
        return tuple((all_tokens, count) for count in cells)

    return [
        ours("ours f32", "float32"),
        ours("ours f16", "float16"),
        ours("ours f32, screened", "float32", screened=True),
        ours("ours f16, screened", "float16", screened=True),
        by_faiss.flat("tokens", k),
        by_faiss.scalar_8bit(k),
        *(
            by_faiss.hnsw("tokens", links, ((128, 128), (all_tokens, all_tokens), (all_tokens, 1024)), rescored=False)
            for links in (16, 32)
        ),
        *(by_faiss.ivf_pq("tokens", lists, code, probed(1, 4, 16), rescored=False) for lists in (64, 256)),
        *(by_faiss.ivf_pq("tokens", 256, size, probed(16), rescored=False) for size in (code // 2, 2 * code)),
        by_faiss.ivf_pq("tokens", 256, code, probed(4, 16), rescored=True),
        by_faiss.flat("pooled", k),
        by_faiss.flat("pooled", k, (64, 256), rescored=True),
        by_faiss.hnsw("pooled", 16, ((64, 64), (256, 256)), rescored=True),
        by_faiss.ivf_pq("pooled", 64, code, ((256, 4), (256, 16)), rescored=True),
    ]  # fmt: skip


def pareto_methods(k: int, width: int, sizes: Sizes) -> list[Method]:
    """Over large galleries: what people build there. Each point is one place on a method's curve."""
    both = tuple((fetch, fetch) for fetch in (16, 32, 64, 128, 256, 512, 1024))
    of_tokens = ((256, 1), (256, 2), (256, 4), (256, 8), (256, 16), (1024, 16), (1024, 64))
    of_items = ((512, 1), (512, 4), (512, 16), (2048, 16), (2048, 64))
    return [
        ours("ours f16", "float16"),
        ours("ours f16, screened", "float16", screened=True),
        by_faiss.flat("pooled", k, (64, 256, 1024), rescored=True),
        by_faiss.hnsw("pooled", 16, both, rescored=True, most_rows=sizes.graph_rows),
        by_faiss.ivf_pq("tokens", sizes.lists, width // 4, of_tokens, rescored=True),
        by_faiss.ivf_pq("pooled", sizes.lists // 2, width // 2, of_items, rescored=True),
    ]


def storage(bench: Bench) -> dict[str, Any]:
    """The float32 bundle's embeddings, stored and searched in every way; k = 50."""
    setting = bench.setting
    found = setting.embeddings("bundle f32")
    gallery = Gallery(found.target_tokens)
    measured = measure(
        bench, gallery, found.queries, setting.evaluation.reference, storage_methods(DEPTH, gallery.tokens, gallery.width), DEPTH
    )
    return {"queries": len(found.queries), "gallery": gallery.count, "k": DEPTH, **_rows(bench, *measured, len(found.queries))}


def pareto(bench: Bench) -> dict[str, Any]:
    """The same among distractors; k = 10, the first queries only."""
    setting = bench.setting
    found = setting.embeddings("bundle f32")
    asked = min(bench.sizes.asked, len(found.queries))
    out = []
    for count in bench.sizes.galleries:
        bench.step(f"drawing {count:,} items")
        gallery = among_distractors(found.target_tokens, count)
        queries, references = found.queries[:asked], setting.evaluation.reference[:asked]
        measured = measure(bench, gallery, queries, references, pareto_methods(TOP, gallery.width, bench.sizes), TOP)
        out.append({"label": f"{gallery.count:,} items", "items": gallery.count, **_rows(bench, *measured, asked)})
    distractors = {"real": len(found.target_tokens), "mixed": MIXED, "noise": NOISE}
    return {"queries": asked, "k": TOP, "distractors": distractors, "galleries": out}


@dataclass(slots=True)
class Measured:
    """One point of a method. `results` by batch size."""

    name: str
    method: Method
    point: Point | None
    status: str = "ok"
    size: int = 0
    build_s: float = 0.0
    ranked: I64 | None = None
    results: dict[int, Result] = field(default_factory=dict)


def measure(bench: Bench, gallery: Gallery, queries: F32, references: I64, methods: Sequence[Method], k: int) -> tuple[list[Measured], I64]:
    """Build everything, rank all queries with each point, then time all points in turns. Also the exact rankings, float32 or as drawn."""
    measured: list[Measured] = []
    for method in methods:
        reason = method.obstacle(gallery)
        if method.package is not None and find_spec(method.package) is None:
            reason = "not installed"
        if reason:
            measured.append(Measured(method.name, method, None, reason))
            continue
        bench.step(f"{gallery.count:,} items: building {method.name}")
        built, seconds = method.timed_build(gallery)
        for point in built.points:
            settings = ", ".join(f"{name} {value}" for name, value in point.settings.items())
            name = f"{method.name}: {settings}" if settings else method.name
            bench.step(f"{gallery.count:,} items: ranking by {name}")
            ranked = _ranked(point, queries, references, k)
            measured.append(Measured(name, method, point, size=built.size, build_s=seconds, ranked=ranked))
    points = {m.name: m.point for m in measured if m.point is not None}
    label = f"{gallery.count:,} items × {gallery.tokens} tokens, D = {gallery.width}, k = {k}"
    cases = [GalleryCase(f"{label}, B = {b}", gallery, queries, references, points, b, k) for b in bench.sizes.batches if b <= len(queries)]
    turns = [Turns(case, bench.sizes.rounds, on_step=bench.step) for case in cases]
    for _ in range(bench.sizes.blocks):
        for turn in turns:
            turn.block()
    for case, turn in zip(cases, turns, strict=True):
        results = {result.name: result for result in turn.results()}
        for m in measured:
            if m.name in results:
                m.results[case.batch] = results[m.name]
    truth = next(m.ranked for m in measured if m.ranked is not None)  # the first method: ours, held against float64 above
    return measured, truth


def _ranked(point: Point, queries: F32, references: I64, k: int) -> I64:
    parts = [slice(start, start + _SEARCHED) for start in range(0, len(queries), _SEARCHED)]
    return np.concatenate([point.search(queries[part], references[part], k)[1] for part in parts])


def _rows(bench: Bench, measured: Sequence[Measured], exact: I64, asked: int) -> dict[str, Any]:
    evaluation, items = bench.setting.evaluation, len(bench.setting.evaluation.gallery)
    target, relevant = evaluation.target[:asked], None if evaluation.relevant is None else evaluation.relevant[:asked]
    judge = partial(outcomes, target=target, exact=exact, relevant=relevant)
    base, rows = judge(exact), []
    for m in measured:
        row: dict[str, Any] = {"name": m.name, "method": m.method.name, "how": m.method.how, "status": m.status}
        if m.point is not None and m.ranked is not None:
            found = judge(m.ranked)
            row |= {
                "settings": m.point.settings, "exact": m.point.exact, "bytes": m.size, "build_s": round(m.build_s, 2),
                **record(found), "difference": differences(found, base),
                "batches": {str(batch): result.record() for batch, result in m.results.items()},
            }  # fmt: skip
        rows.append(row)
    return {"real_items": items, "rows": rows}


# -- public datasets -------------------------------------------------------------------------------------------------------


def public(bench: Bench) -> dict[str, Any]:
    """Public datasets by their own protocols, where a folder was given: the checkpoint in PyTorch, and each bundle."""
    return {"datasets": [_dataset(bench, name, bench.public.get(name)) for name in PUBLIC]}


def _dataset(bench: Bench, name: str, folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {"name": name, "status": f"not run: no images here (--{name} DIR)", "rows": []}
    benchmark = open_benchmark(folder, name)
    assert benchmark is not None  # a named dataset that is not there is an error
    split, rows = benchmark.splits[0], []
    for model, kind in zip(MODELS, (None, *PRECISIONS), strict=True):
        bench.step(f"{name}: {model}")
        try:
            path = bench.setting.checkpoint if kind is None else bench.setting.bundle_of(kind)
        except NotExportedError as error:
            rows.append({"name": model, "status": f"not exported: {error}"})
            continue
        report, _ = evaluate_benchmark(benchmark, open_ranker(path), split=split)
        rows.append({"name": model, "status": "ok", "report": msgspec.to_builtins(report)})
    return {"name": name, "status": "ok", "split": split, "rows": rows}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "precision": precision, "storage": storage, "pareto": pareto, "public": public,
}  # fmt: skip
