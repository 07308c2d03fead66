"""A model of cost: the query encoder's time by its size, the search's by N, M, D and B, each checked where it was not fitted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dqe_engine.contracts.graphs import QUERY_ENCODER, GraphSizes
from dqe_engine.sessions import OnnxSession
from dqe_engine.zones import select_zones
from dqe_export.inputs import random_arrays

from ..harness import SETTLE_SECONDS, Rounds, Timing
from ..isolated import in_own_process
from .fit import Fit, fit
from .setting import Setting

if TYPE_CHECKING:
    from dqe_training.model import DQEModel

TEXT_LENGTH = 12
VOCABULARY = 1000
K = 10
FEW_QUERIES = 4
GALLERIES = (1_000_000, 100_000_000)
NODES = (1, 4, 16, 64)
MERGE_MS = 1.0
"""Assumed: sending a query to all nodes at once, and merging their answers."""


@dataclass(frozen=True, slots=True)
class EncoderSize:
    """A query encoder of random weights; image tokens are as wide as it is."""

    layers: int
    width: int
    query_tokens: int
    image_tokens: int

    @property
    def name(self) -> str:
        return f"{self.layers} × {self.width}, {self.query_tokens} queries, {self.image_tokens} image tokens"


@dataclass(frozen=True, slots=True)
class SearchSize:
    """A search of `batch` queries."""

    items: int
    tokens: int
    width: int
    batch: int

    @property
    def name(self) -> str:
        return f"N = {self.items:,}, M = {self.tokens}, D = {self.width}, B = {self.batch}"

    @property
    def terms(self) -> dict[str, float]:
        """What the search's time is made of: a call, bytes of the items read, multiply-adds. Few queries run along D, more side by side
        (decision 18), so each of the two kernels has its own rates."""
        values = float(self.items * self.tokens * self.width)
        costs = {"bytes": 4 * values, "flops": 2 * self.batch * values}
        few = self.batch <= FEW_QUERIES
        return {"call": 1.0} | {
            f"{name}, {which}": value if few == (which == "few queries") else 0.0
            for which in ("few queries", "many queries")
            for name, value in costs.items()
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Points to fit, and points held out; a held-out encoder lies between the fitted ones, or beyond them with `--full`."""

    encoders: tuple[EncoderSize, ...]
    held_out_encoders: tuple[EncoderSize, ...]
    searches: tuple[SearchSize, ...]
    held_out_searches: tuple[SearchSize, ...]
    batches: tuple[int, ...]
    rounds: Rounds
    blocks: int


@dataclass(frozen=True, slots=True)
class Point:
    """What is timed, and the value of each term of the model there."""

    name: str
    held_out: bool
    terms: dict[str, float]
    run: Callable[[], Any]


def sizing(setting: Setting, plan: Plan, *, step: Callable[[str], None], reached: Callable[[float], None]) -> dict[str, Any]:
    """Both models: coefficients, every point with what the model says of it, and what follows for galleries on several nodes."""
    encoders = _encoders(setting, plan, step)
    reached(0.6)
    searches = _searches(setting, plan, step)
    return {"encoder": encoders, "search": searches, "galleries": galleries(setting, searches["coefficients"])}


def _encoders(setting: Setting, plan: Plan, step: Callable[[str], None]) -> dict[str, Any]:
    sizes = plan.encoders + plan.held_out_encoders
    points: list[Point] = []
    for size in sizes:
        path = setting.work.parent / "sizing" / f"{size.layers}-{size.width}-{size.query_tokens}-{size.image_tokens}.onnx"
        if not path.exists():
            step(f"exporting a query encoder of {size.name}")
            in_own_process(write_encoder, size, path)
        shape = sizes_of(size)
        session = OnnxSession(path, QUERY_ENCODER, shape, provider="cpu", threads=setting.threads)
        for batch in plan.batches:
            inputs = random_arrays(QUERY_ENCODER, shape, VOCABULARY, batch=batch, text_length=TEXT_LENGTH, seed=0)
            terms = {"call": 1.0, "layers": float(size.layers), "flops": batch * encoder_flops(size), "bytes": float(path.stat().st_size)}
            held_out = size in plan.held_out_encoders
            points.append(Point(f"{size.name}, B = {batch}", held_out, terms, partial(session.run, **inputs)))
    return _fitted(points, plan, step)


def _searches(setting: Setting, plan: Plan, step: Callable[[str], None]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = plan.searches + plan.held_out_searches
    pool = rng.standard_normal(max(s.items * s.tokens * s.width for s in sizes), np.float32)
    points: list[Point] = []
    for size in sizes:
        items = pool[: size.items * size.tokens * size.width].reshape(size.items, size.tokens, size.width)
        queries = rng.standard_normal((size.batch, size.width), np.float32)
        search = partial(select_zones, queries, items, k=K, threads=setting.threads)
        points.append(Point(size.name, size in plan.held_out_searches, size.terms, search))
    return _fitted(points, plan, step)


def _fitted(points: Sequence[Point], plan: Plan, step: Callable[[str], None]) -> dict[str, Any]:
    """Time all points in turns, block by block, and fit those that are not held out."""
    blocks: list[list[list[float]]] = [[] for _ in points]
    for point in points:
        point.run()
    for block in range(plan.blocks):
        for point, taken in zip(points, blocks, strict=True):
            step(f"{point.name}, block {block + 1} of {plan.blocks}")
            samples: list[float] = []
            while plan.rounds.wants(samples):
                time.sleep(SETTLE_SECONDS)
                started = time.perf_counter()
                point.run()
                samples.append(time.perf_counter() - started)
            taken.append(samples)
    timed = [(point, Timing.of_blocks(taken)) for point, taken in zip(points, blocks, strict=True)]
    known = [(point.terms, timing.median) for point, timing in timed if not point.held_out]
    model = fit([terms for terms, _ in known], [median for _, median in known])
    rows = [
        {
            "name": point.name,
            "held_out": point.held_out,
            "terms": point.terms,
            "predicted_s": model(point.terms),
            "error": model.error(point.terms, timing.median),
            **timing.record(),
        }
        for point, timing in timed
    ]
    return {"coefficients": model.record(), "rows": rows}


def sizes_of(size: EncoderSize) -> GraphSizes:
    """Of the exported graph; no axis of the query encoder is `image_size`."""
    return GraphSizes(
        image_size=1,
        image_tokens=size.image_tokens,
        vision_width=size.width,
        embedding_dim=256,
        target_tokens=size.query_tokens,
        hidden_size=size.width,
        query_tokens=size.query_tokens,
        attributes=4,
    )


def encoder_flops(size: EncoderSize) -> float:
    """Of the matrix products for one query, two per multiply-add. Every second layer has cross-attention, by keys and values."""
    h, q, p = size.width, size.query_tokens, size.image_tokens
    t = q + TEXT_LENGTH
    attention = 4 * t * h * h + 2 * t * t * h
    cross = 2 * q * h * h + 2 * p * h * h + 2 * q * p * h
    feed_forward = 8 * t * h * h
    return 2.0 * (size.layers * (attention + feed_forward) + (size.layers + 1) // 2 * cross)


def build_encoder(size: EncoderSize) -> DQEModel:
    """Of random weights."""
    import torch

    from dqe_engine.contracts.preprocessing import PreprocessingSpec
    from dqe_training.config import ModelConfig, QFormerConfig, VisionConfig
    from dqe_training.data.garments.catalog import vocabulary
    from dqe_training.model import DQEModel

    side = round((size.image_tokens - 1) ** 0.5)
    torch.manual_seed(0)
    config = ModelConfig(
        preprocessing=PreprocessingSpec(image_size=8 * side),
        vision=VisionConfig(hidden_size=size.width, layers=1, heads=4, patch_size=8),
        qformer=QFormerConfig(
            hidden_size=size.width, layers=size.layers, heads=size.width // 64, query_tokens=size.query_tokens, embedding_dim=256,
            cross_attention_frequency=2,
        ),
    )  # fmt: skip
    return DQEModel(config, vocabulary(), VOCABULARY).eval()


def write_encoder(size: EncoderSize, path: Path) -> None:
    """Export a query encoder, with upstream's cross-attention. Imports torch: call in a process of its own."""
    from dqe_export.onnx_graph import export_graph
    from dqe_training.model.cross_attention import upstream_attention

    model = build_encoder(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    with upstream_attention(model.qformer):
        export_graph(QUERY_ENCODER, model, temporary)
    temporary.rename(path)


def galleries(setting: Setting, coefficients: dict[str, float]) -> list[dict[str, Any]]:
    """The search of one query over large galleries that are split evenly over nodes like this machine, and the memory of each."""
    targets = np.load(setting.targets_file, mmap_mode="r")
    model, out = Fit(coefficients), []
    for items in GALLERIES:
        for nodes in NODES:
            part = SearchSize(-(-items // nodes), targets.shape[1], targets.shape[2], 1)
            seconds = model(part.terms) + (MERGE_MS / 1e3 if nodes > 1 else 0.0)
            shape = {"tokens": part.tokens, "width": part.width}
            out.append(
                {
                    "items": items,
                    "nodes": nodes,
                    **shape,
                    "search_s": seconds,
                    "bytes_per_node": 4.0 * part.items * part.tokens * part.width,
                }
            )
    return out
