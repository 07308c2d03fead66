"""From a finished demo run to what the page shows and to metrics.json."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from datetime import date
from typing import Any

import msgspec
import numpy as np

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.doctor.machine import processor_name
from dqe_engine.doctor.packages import installed_of
from dqe_engine.engine import STAGES
from dqe_engine.query import Query
from dqe_engine.results import SearchResult
from dqe_engine.zones import select_zones
from dqe_training.ablation.statistics import compare as compare_paired
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl
from dqe_training.evaluation.protocol import Report, folder_figures
from dqe_training.evaluation.runtime import agreement
from dqe_training.run.configuration import load_config

from .comparison import compare
from .pipeline import DemoRun, TrainedModel
from .report_data import (
    Agreement,
    DatasetSizes,
    DeltaHistogram,
    Environment,
    ExampleHit,
    ExampleQuery,
    LatencyProfile,
    ModelResult,
    ModelSize,
    OverrideExample,
    ReportData,
    StageLatency,
    curve_from_metrics,
)

Attributes = dict[str, dict[str, str]]
_PLAIN_KEYS = (
    "recall_at_1", "recall_at_5", "recall_at_10", "recall_at_50", "attribute_precision_at_10", "heldout_recall_at_10", "map_at_10",
)  # fmt: skip


def collect(run: DemoRun, *, command: str) -> ReportData:
    """Everything on the page; searches the engine for examples and times it."""
    attributes = {r.image: r.attributes for r in read_jsonl(run.directory / "garments" / "images.jsonl", ImageRecord)}
    share, difference, identical = agreement(run.dqe.evaluations[0], run.runtime)
    zones = load_config(run.options.config, run.options.overrides).trns.zones
    dataset = run.options.dataset
    return ReportData(
        models=(_result(run, run.dqe), msgspec.structs.replace(_result(run, run.baseline), margins=_margins(run))),
        dataset=DatasetSizes(
            name="garments", train_images=dataset.train_images, train_triplets=dataset.train_triplets,
            gallery_images=dataset.gallery_images, val_queries=dataset.val_queries,
        ),
        model_size=ModelSize(parameters=run.parameters, bundle_bytes=sum(f.size for f in run.engine.bundle.manifest.files)),
        environment=_environment(run.commit),
        seconds=run.seconds,
        command=command,
        image_root=str(run.directory / "garments" / "images"),
        examples=tuple(_example(run, record, attributes) for record in pick_examples(run.evaluation.records)),
        overrides=_overrides(run, attributes),
        curves=tuple(curve_from_metrics(m.name, m.checkpoints[0].parent / "metrics.jsonl") for m in (run.dqe, run.baseline)),
        latency=tuple(_latency(run, name, by_id=by_id) for name, by_id in (("Catalogue reference", True), ("Uploaded reference", False))),
        delta_histogram=_histogram(run, zones),
        agreement=Agreement(
            queries=len(run.evaluation.records),
            runtime_top10_agreement=share,
            embedding_max_abs_diff=difference,
            recall_identical=identical,
        ),
        attainable=_attainable(run),
        zones_note=_zones_note(zones),
    )  # fmt: skip


def metrics(data: ReportData) -> dict[str, Any]:
    """The page's figures under plain keys, means over the seeds."""
    ours, baseline = data.models[0], data.models[1]
    assert data.agreement is not None
    return {
        **_plain(ours.reports),
        "seeds": len(ours.reports),
        "baseline": _plain(baseline.reports),
        "differences": {d.label: {"value": d.value, "margin": d.margin, "outcome": d.outcome} for d in compare(ours, baseline)},
        "queries": ours.reports[0].queries,
        "gallery": ours.reports[0].gallery,
        "training_seconds": {"dqe": ours.training_seconds, "baseline": baseline.training_seconds},
        "steps": {"dqe": ours.steps, "baseline": baseline.steps},
        "mining_seconds": ours.mining_seconds,
        "attainable": data.attainable,
        "weight_auc": _mean_dict([r.weight_auc or {} for r in ours.reports]),
        "runtime_top10_agreement": data.agreement.runtime_top10_agreement,
        "runtime_recall_identical": data.agreement.recall_identical,
        "embedding_max_abs_diff": data.agreement.embedding_max_abs_diff,
        "latency_ms": {p.name: {"p50": p.total.p50_ms, "p95": p.total.p95_ms} for p in data.latency},
        "seconds": data.seconds,
        "seconds_in_all": round(sum(data.seconds.values()), 1),
        "command": data.command,
        "environment": msgspec.to_builtins(data.environment),
    }


def _plain(reports: Sequence[Report]) -> dict[str, float | None]:
    values = {key: [getattr(r, key) for r in reports] for key in _PLAIN_KEYS}
    return {key: None if None in found else float(np.mean(found)) for key, found in values.items()}


def _mean_dict(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([p[name] for p in parts])) for name in parts[0]}


def _result(run: DemoRun, model: TrainedModel) -> ModelResult:
    figures = [folder_figures(run.evaluation, found.ranked) for _, found in model.evaluations]
    return ModelResult(
        name=model.name,
        reports=tuple(report for report, _ in model.evaluations),
        training_seconds=float(np.mean(model.seconds)),
        steps=round(float(np.mean(model.steps))),
        mining_seconds=sum(model.mining) / len(model.seconds) if model.mining else None,
        halves={key: float(np.mean([by_seed[key].half for by_seed in figures])) for key in figures[0]},
        note="a nameless attention pool; no LAW, no TRNS" if "baseline" in model.name.lower() else "",
    )


def _margins(run: DemoRun) -> dict[str, float]:
    """`ModelResult.margins` of the baseline: both models answered the same queries, with the same seeds."""
    ours, theirs = ([folder_figures(run.evaluation, found.ranked) for _, found in m.evaluations] for m in (run.dqe, run.baseline))
    differences = {key: compare_paired([f[key] for f in ours], [f[key] for f in theirs]) for key in ours[0]}
    return {key: d.half_queries if d.half is None else d.half for key, d in differences.items() if d is not None}


def _attainable(run: DemoRun) -> dict[str, float]:
    """The expectation for a ranking that puts every valid image first, in any order."""
    assert run.evaluation.relevant is not None
    sizes = np.asarray([len(r) for r in run.evaluation.relevant], float)
    return {f"recall_at_{k}": float(np.minimum(1.0, k / sizes).mean()) for k in (1, 5, 10, 50)}


# -- examples -----------------------------------------------------------------------------------------------------------


def pick_examples(records: Sequence[TripletRecord], count: int = 12) -> list[TripletRecord]:
    """The first query of each set of named attributes, then the first held-out ones: chosen before anything is searched."""
    firsts: dict[tuple[str, ...], TripletRecord] = {}
    for record in records:
        firsts.setdefault(tuple(sorted(record.attributes or {})), record)
    chosen = list(firsts.values())[:count]
    spare = [r for r in records if r.held_out and r not in chosen]
    return chosen + spare[: max(0, count - len(chosen))]


def _describe(attributes: dict[str, str]) -> str:
    return f"{attributes['colour']} {attributes['pattern']} {attributes['shape']}, {attributes['length']}"


def _example(
    run: DemoRun, record: TripletRecord, attributes: Attributes, *, overrides: dict[str, float] | None = None, depth: int | None = None
) -> ExampleQuery:
    result = run.engine.search(
        Query(reference_id=record.reference, text=record.text, k=depth or len(run.evaluation.gallery), weights=overrides or {})
    )
    kept = {name: [value] for name, value in attributes[record.reference].items()}
    allowed = kept | (record.allowed or {})

    def misfit(image: str) -> tuple[str, ...]:
        return tuple(name for name, values in allowed.items() if attributes[image][name] not in values)

    ranks = {hit.id: rank for rank, hit in enumerate(result.hits, start=1)}
    return ExampleQuery(
        reference=record.reference,
        text=record.text,
        target=record.target,
        hits=tuple(
            ExampleHit(
                image=h.id, score=h.score, delta=h.delta, valid=not misfit(h.id), is_target=h.id == record.target, misfit=misfit(h.id),
                label=_describe(attributes[h.id]),
            )
            for h in result.hits[:10]
        ),
        weights=result.weights,
        named=tuple(record.attributes or {}),
        held_out=record.held_out,
        target_rank=ranks.get(record.target),
        valid_images=sum(not misfit(image) for image in run.evaluation.gallery if image != record.reference),
        reference_label=_describe(attributes[record.reference]),
        target_label=_describe(attributes[record.target]),
    )  # fmt: skip


def _overrides(run: DemoRun, attributes: Attributes, factor: float = 4.0) -> tuple[OverrideExample, ...]:
    """The first query that names colour and shape, as predicted and with the colour turned up."""
    record = next(r for r in run.evaluation.records if set(r.attributes or {}) == {"colour", "shape"})
    predicted = _example(run, record, attributes)
    overridden = _example(run, record, attributes, overrides={"colour": factor})
    return (OverrideExample(attribute="colour", factor=factor, predicted=predicted, overridden=overridden),)


# -- measurements -------------------------------------------------------------------------------------------------------


def _latency(run: DemoRun, name: str, *, by_id: bool, queries: int = 200, warmup: int = 20) -> LatencyProfile:
    """One query at a time, warm. By id the reference's image tokens come from the index; otherwise from its JPEG."""
    root = run.directory / "garments" / "images"
    records = run.evaluation.records
    results: list[SearchResult] = []
    totals: list[float] = []
    for i in range(warmup + queries):
        record = records[i % len(records)]
        started = time.perf_counter()
        reference = record.reference if by_id else None
        result = run.engine.search(Query(reference_id=reference, image=None if by_id else root / record.reference, text=record.text))
        if i >= warmup:
            totals.append((time.perf_counter() - started) * 1e3)
            results.append(result)
    stages = tuple(_stage(stage, [r.timings_ms.get(stage, 0.0) for r in results]) for stage in STAGES)
    return LatencyProfile(name=name, queries=len(totals), stages=stages, total=_stage("total", totals))


def _stage(name: str, values: Sequence[float]) -> StageLatency:
    p50, p95 = np.percentile(values, [50, 95])
    return StageLatency(stage=name, p50_ms=float(p50), p95_ms=float(p95))


def _zones_note(zones: ZoneSpec) -> str:
    of = {
        "absolute": "bounds are Δ = {} and {}",
        "pooled": "bounds end the least {} and {} of all Δ ≥ 0, the queries taken together",
        "rank": "bounds are at the fractions {} and {} of each query's own list",
    }
    return of[zones.bounds].format(f"{zones.lo:g}", f"{zones.hi:g}")


def _histogram(run: DemoRun, zones: ZoneSpec, bins: int = 60) -> DeltaHistogram:
    """Δ = s(q, target) - s(q, candidate) over all pairs of query and gallery image, the pair's own two left out."""
    _, embeddings = run.runtime
    evaluation = run.evaluation
    exclude = np.stack([evaluation.target, evaluation.reference], axis=1).tolist()
    found = select_zones(embeddings.queries, embeddings.target_tokens, anchor=evaluation.target, zones=zones, counts=True, exclude=exclude)
    assert found.counts is not None
    assert found.lo is not None
    assert found.hi is not None
    edges = np.linspace(-0.6, 1.4, bins + 1)
    counts = np.zeros(bins, np.int64)
    flat = embeddings.target_tokens.reshape(-1, embeddings.target_tokens.shape[2])
    for start in range(0, len(embeddings.queries), 128):
        rows = slice(start, start + 128)
        queries, targets = embeddings.queries[rows], evaluation.target[rows]
        scores = (queries @ flat.T).reshape(len(queries), len(evaluation.gallery), -1).max(axis=2)
        delta = scores[np.arange(len(queries)), targets][:, None] - scores
        delta[np.arange(len(queries))[:, None], np.stack([targets, evaluation.reference[rows]], axis=1)] = np.nan
        counts += np.histogram(np.clip(delta[~np.isnan(delta)], edges[0], edges[-1]), edges)[0]
    near, mid, easy = (found.counts.sum(axis=0) / found.counts.sum()).tolist()
    return DeltaHistogram(
        edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), lo=float(np.median(found.lo)), hi=float(np.median(found.hi)),
        near_share=near, mid_share=mid, easy_share=easy, queries=len(embeddings.queries),
    )  # fmt: skip


def _environment(commit: str) -> Environment:
    packages = ("dqe-engine", "torch", "transformers", "onnx", "onnxruntime", "numpy", "pillow", "tokenizers")
    return Environment(
        cpu=processor_name(), cores=os.cpu_count() or 1, python=platform.python_version(), versions=installed_of(packages),
        date=date.today().isoformat(), commit=commit,
    )  # fmt: skip
