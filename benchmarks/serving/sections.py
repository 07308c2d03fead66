"""The sections of the benchmark: what each measures at which sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..harness import Rounds, Turns
from ..isolated import add_alone, in_own_process
from ..machine import limit_threads
from . import cold as cold_start
from . import gallery as large
from . import sizing
from .cases import QueryCase
from .checks import write_truth
from .setting import KINDS, Setting
from .stages import stages
from .throughput import LOADS, Load, throughput

_ENCODERS = (
    sizing.EncoderSize(2, 128, 8, 65),
    sizing.EncoderSize(2, 256, 16, 65),
    sizing.EncoderSize(6, 256, 16, 197),
    sizing.EncoderSize(4, 384, 32, 197),
    sizing.EncoderSize(6, 512, 32, 257),
    sizing.EncoderSize(4, 768, 32, 257),
)
_BETWEEN = sizing.EncoderSize(6, 384, 16, 257)
_BLIP2 = sizing.EncoderSize(12, 768, 32, 257)
_SEARCHES = tuple(  # beyond the caches
    sizing.SearchSize(items, tokens, width, batch)
    for items, tokens, width in (
        (100_000, 1, 256),
        (200_000, 1, 128),
        (40_000, 8, 128),
        (200_000, 1, 256),
        (100_000, 8, 64),
        (50_000, 8, 256),
    )
    for batch in (1, 4, 16, 64)
)
_QUICK_SEARCHES = tuple(sizing.SearchSize(items, 1, 64, batch) for items in (5_000, 20_000) for batch in (1, 4, 16, 64))
_HELD_OUT_SEARCHES = (sizing.SearchSize(100_000, 4, 128, 1), sizing.SearchSize(100_000, 4, 128, 2), sizing.SearchSize(100_000, 4, 128, 32))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; `quick` is for seeing that it runs."""

    items: int = 5_000
    pool: int = 128
    batches: tuple[int, ...] = (1, 8, 64)
    compiled: bool = True
    alone: bool = True
    blocks: int = 4
    rounds: Rounds = dataclasses.field(default_factory=lambda: Rounds(minimum=3, maximum=20, seconds=0.12))
    stage_queries: int = 50
    loads: tuple[Load, ...] = LOADS
    load_seconds: float = 0.3
    galleries_of_one: tuple[int, ...] = (10_000, 100_000, 1_000_000, 5_000_000)
    """Items of one token."""
    galleries: tuple[int, ...] = (10_000, 100_000, 300_000)
    """Items of the model's own number of tokens."""
    gallery_queries: int = 4
    resident_items: int = 200_000
    starts: int = 5
    encoders: tuple[sizing.EncoderSize, ...] = _ENCODERS
    held_out_encoders: tuple[sizing.EncoderSize, ...] = (_BETWEEN,)
    searches: tuple[sizing.SearchSize, ...] = _SEARCHES
    held_out_searches: tuple[sizing.SearchSize, ...] = _HELD_OUT_SEARCHES

    @classmethod
    def full(cls) -> Sizes:
        return cls(
            pool=256,
            batches=(1, 2, 4, 8, 16, 32, 64),
            blocks=6,
            rounds=Rounds(minimum=5, maximum=40, seconds=0.4),
            stage_queries=100,
            load_seconds=1.0,
            galleries_of_one=(10_000, 30_000, 100_000, 300_000, 1_000_000, 5_000_000),
            galleries=(10_000, 30_000, 100_000, 300_000, 1_000_000),
            gallery_queries=10,
            resident_items=1_000_000,
            starts=10,
            held_out_encoders=(_BETWEEN, _BLIP2),
        )

    @classmethod
    def quick(cls) -> Sizes:
        return cls(
            items=1_000,
            pool=16,
            batches=(1, 16),
            compiled=False,
            alone=False,
            blocks=3,
            rounds=Rounds(minimum=2, maximum=5, seconds=0.05),
            stage_queries=5,
            loads=(Load(1, 1), Load(2, 1), Load(1, 16)),
            load_seconds=0.1,
            galleries_of_one=(2_000, 10_000),
            galleries=(2_000, 5_000),
            gallery_queries=2,
            resident_items=10_000,
            starts=2,
            encoders=_ENCODERS[:3],
            held_out_encoders=(sizing.EncoderSize(4, 256, 16, 65),),
            searches=_QUICK_SEARCHES,
            held_out_searches=(sizing.SearchSize(10_000, 1, 64, 1),),
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """What all sections share. `step` shows what is being done, `reached` the share of the section that is."""

    setting: Setting
    sizes: Sizes
    wanted: Callable[[str], bool]
    step: Callable[[str], None]
    reached: Callable[[float], None]


def query(bench: Bench) -> dict[str, Any]:
    """End to end, by kind of reference and batch: everybody in turns, in blocks over all cases, and each alone, also without pauses."""
    sizes, threads = bench.sizes, bench.setting.threads
    bench.step("true scores by PyTorch")
    in_own_process(write_truth, bench.setting)
    cases = [QueryCase(bench.setting, kind, batch, sizes.compiled) for kind in KINDS for batch in sizes.batches]
    turns = []
    for number, case in enumerate(cases):
        bench.reached(0.3 * number / len(cases))
        prepared = lambda: limit_threads(threads)  # noqa: E731
        turns.append(Turns(case, sizes.rounds, wanted=bench.wanted, on_step=bench.step, prepared=prepared))
    for block in range(sizes.blocks):
        bench.reached(0.3 + 0.3 * block / sizes.blocks)
        for turn in turns:
            turn.block()
    results = [turn.results() for turn in turns]
    bench.reached(0.6)
    if sizes.alone:
        add_alone(cases, results, sizes.rounds, threads, step=bench.step, blocks=sizes.blocks, busy=True)
    rows: Sequence[dict[str, Any]] = [
        {"label": case.label, "case": case.describe(), "contenders": [result.record() for result in row]}
        for case, row in zip(cases, results, strict=True)
    ]
    return {"cases": rows}


def by_stage(bench: Bench) -> dict[str, Any]:
    return stages(bench.setting, queries=bench.sizes.stage_queries, blocks=bench.sizes.blocks, step=bench.step, reached=bench.reached)


def by_load(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    return throughput(
        bench.setting, loads=sizes.loads, blocks=sizes.blocks, seconds=sizes.load_seconds, step=bench.step, reached=bench.reached
    )


def gallery(bench: Bench) -> dict[str, Any]:
    """Galleries of the model's own tokens an item, and of one, which reach further."""
    sizes = bench.sizes
    tokens = large.tokens_of(bench.setting)
    series = [large.Series(1, sizes.galleries_of_one, sizes.gallery_queries, sizes.blocks)]
    if tokens > 1:
        series.append(large.Series(tokens, sizes.galleries, sizes.gallery_queries, sizes.blocks))
    return large.gallery(bench.setting, series=tuple(series), resident_items=sizes.resident_items, step=bench.step, reached=bench.reached)


def cold(bench: Bench) -> dict[str, Any]:
    return cold_start.cold(bench.setting, repetitions=bench.sizes.starts, step=bench.step, reached=bench.reached)


def model_size(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    plan = sizing.Plan(
        encoders=sizes.encoders,
        held_out_encoders=sizes.held_out_encoders,
        searches=sizes.searches,
        held_out_searches=sizes.held_out_searches,
        batches=(1, 8),
        rounds=dataclasses.replace(sizes.rounds, maximum=min(8, sizes.rounds.maximum)),
        blocks=sizes.blocks,
    )
    return sizing.sizing(bench.setting, plan, step=bench.step, reached=bench.reached)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "query": query,
    "stages": by_stage,
    "throughput": by_load,
    "gallery": gallery,
    "cold": cold,
    "model-size": model_size,
}
