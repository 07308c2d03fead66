"""Everything that the demo's page shows, as frozen structs. `report.py` and `picture.py` draw them; nobody else formats figures.

Image paths are strings; relative ones are resolved against `ReportData.image_root`. Shares and recalls are in [0, 1],
times in seconds unless the name says `ms`.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from dqe_engine.contracts.parsing import Contract
from dqe_engine.errors import InputError
from dqe_training.evaluation.protocol import Report


class ModelResult(Contract, frozen=True):
    """One row of the table. `reports`: one per training seed, all over the same queries; `training_seconds` is their mean.
    `mining_seconds`: how many of them went into mining; None where nothing was mined, or a run was resumed when trained.
    `margins`: Report key → half-width of the 95 % interval of the paired difference from the model shown, with several seeds over seeds
    and queries, else over queries; empty for the model shown itself. `halves`: the same of each figure by itself, over queries, mean over
    seeds; where a key is not there, the page works out what the figure alone tells."""

    name: str
    reports: tuple[Report, ...]
    training_seconds: float
    steps: int
    note: str = ""
    mining_seconds: float | None = None
    margins: dict[str, float] = msgspec.field(default_factory=dict)
    halves: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.reports:
            raise ValueError(f"{self.name}: no reports; expected one per seed")
        if len({(r.queries, r.gallery) for r in self.reports}) > 1:
            raise ValueError(f"{self.name}: the seeds' reports are over different queries or galleries")


class ExampleHit(Contract, frozen=True):
    """A retrieved image. `delta`: best score minus this one. `valid`: satisfies text and reference; `is_target`: is the
    labelled target. `misfit` names the attributes that are wrong, `label` describes the image ("teal striped coat, long").
    """

    image: str
    score: float
    delta: float
    valid: bool
    is_target: bool
    misfit: tuple[str, ...] = ()
    label: str = ""


class ExampleQuery(Contract, frozen=True):
    """A query and what came back. `weights`: those that composed the query, per attribute, in vocabulary order.

    `named`: the attributes that the text truly asks to change (their bars are coloured); None where unknown.
    `valid_images`: how many of the gallery are valid; None where unknown.
    `target_rank`: 1-based rank of the labelled target in the whole gallery; None where unknown.
    """

    reference: str
    text: str
    target: str
    hits: tuple[ExampleHit, ...]
    weights: dict[str, float]
    named: tuple[str, ...] | None = None
    held_out: bool = False
    target_rank: int | None = None
    valid_images: int | None = None
    reference_label: str = ""
    target_label: str = ""


class OverrideExample(Contract, frozen=True):
    """The same query with predicted weights and with `attribute`'s weight multiplied by `factor`."""

    attribute: str
    factor: float
    predicted: ExampleQuery
    overridden: ExampleQuery


class TrainingCurve(Contract, frozen=True):
    """Loss parts over training seconds: part name → ((seconds, value), ...). `recall`: R@10 over seconds, where measured."""

    model: str
    parts: dict[str, tuple[tuple[float, float], ...]]
    recall: tuple[tuple[float, float], ...] = ()


class StageLatency(Contract, frozen=True):
    """Milliseconds of one stage of one query."""

    stage: str
    p50_ms: float
    p95_ms: float


class LatencyProfile(Contract, frozen=True):
    """One way of asking ("Reference from the catalogue"). `total`: measured over whole queries, not a sum of stages."""

    name: str
    queries: int
    stages: tuple[StageLatency, ...]
    total: StageLatency


class DeltaHistogram(Contract, frozen=True):
    """Pairs (query, candidate) by Δ = s(q, target) − s(q, candidate).

    `edges` has one value more than `counts`. near: Δ < lo; mid: lo ≤ Δ ≤ hi; easy: Δ > hi; lo and hi are medians over the
    queries where bounds are ranks. The shares are of all pairs.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    lo: float
    hi: float
    near_share: float
    mid_share: float
    easy_share: float
    queries: int

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need {len(self.counts) + 1} edges, got {len(self.edges)}")


class Agreement(Contract, frozen=True):
    """Runtime (ONNX) against PyTorch on the same queries. `runtime_top10_agreement`: share with identical top 10."""

    queries: int
    runtime_top10_agreement: float
    embedding_max_abs_diff: float
    recall_identical: bool


class DatasetSizes(Contract, frozen=True):
    name: str
    train_images: int
    train_triplets: int
    gallery_images: int
    val_queries: int


class ModelSize(Contract, frozen=True):
    parameters: int
    bundle_bytes: int


class Environment(Contract, frozen=True):
    """`versions`: package → version, in the order to show. `date`: ISO 8601. `commit`: of the code, empty where there is no checkout."""

    cpu: str
    cores: int
    python: str
    versions: dict[str, str]
    date: str
    commit: str = ""


class ReportData(Contract, frozen=True):
    """The page. `models[0]` is the model shown; each other is compared with it. Empty or None parts leave their section out.

    `attainable`: Report key → the most that a ranking can be expected to reach, as several images answer a query equally
    well but one is labelled. `seconds`: stage of the demo → seconds, in order. `zones_note`: how lo and hi were chosen.
    """

    models: tuple[ModelResult, ...]
    dataset: DatasetSizes
    model_size: ModelSize
    environment: Environment
    seconds: dict[str, float]
    command: str = "make demo"
    image_root: str = ""
    examples: tuple[ExampleQuery, ...] = ()
    overrides: tuple[OverrideExample, ...] = ()
    curves: tuple[TrainingCurve, ...] = ()
    latency: tuple[LatencyProfile, ...] = ()
    delta_histogram: DeltaHistogram | None = None
    agreement: Agreement | None = None
    attainable: dict[str, float] | None = None
    zones_note: str = ""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("no models; expected the trained model first, then the baselines")


def curve_from_metrics(model: str, metrics: Path) -> TrainingCurve:
    """Loss parts from the trainer's `metrics.jsonl` (events "step", keys `seconds` and `loss/*`)."""
    if not metrics.is_file():
        raise InputError(f"{metrics}: no such file; expected the trainer's metrics, JSON lines")
    parts: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            event = json.loads(line)
            if event.get("event") == "step":
                for key, value in event.items():
                    if key.startswith("loss/"):
                        parts.setdefault(key.removeprefix("loss/"), []).append((float(event["seconds"]), float(value)))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as problem:
            raise InputError(f"{metrics}, line {number}: not a training event ({problem})") from problem
    return TrainingCurve(model=model, parts={name: tuple(points) for name, points in parts.items()})
