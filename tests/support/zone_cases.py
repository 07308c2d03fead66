"""Requests for the kernels of zones whose answers are known to the bit, and what compares answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from dqe_engine.contracts.zones import Bounds, Policy, ZoneSpec
from dqe_engine.zones import Screen, ZoneSelection, cpu, reference, resolve_pooled
from dqe_engine.zones.bitmaps import packed
from dqe_engine.zones.lists import TokenLists
from dqe_engine.zones.prefix import Prefix
from dqe_engine.zones.request import ZoneRequest, validated

Anchor = Literal["best", "id", "score"]
Vectors = Literal["integers", "codes", "circle", "rests"]
"""Of a case: "codes", "circle" and "rests" meet the bounds of 8-bit codes, of lists and of prefixes with equality (`met_bounds`)."""
Allowed = Literal["all", "none", "one", "every 64th", "last word", "blocks", "few", "half", "most"]


def allowed_flags(kind: Allowed, rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """(size,) which items may be returned."""
    at = np.arange(size)
    match kind:
        case "all" | "none":
            return np.full(size, kind == "all")
        case "one":
            return at == rng.integers(0, max(size, 1))
        case "every 64th":
            return at % 64 == rng.integers(0, 64)
        case "last word":
            return at >= size // 64 * 64
        case "blocks":  # of a tile's size and others, empty and full
            return at // rng.integers(1, 700) % 2 == 0
        case _:
            flags: NDArray[np.bool_] = rng.random(size) < {"few": 0.02, "half": 0.5, "most": 0.97}[kind]
            return flags


def prefix_width(width: int) -> int:
    """Numbers of a prefix that tests make for vectors of `width`; 0: none."""
    return 16 * min(4, width // 16)


def met_bounds(kind: Vectors, rng: np.random.Generator, *shape: int, queries: bool = False) -> NDArray[np.float64] | None:
    """(..., D) whole numbers, of items or of queries, whose scores a bound exceeds by nothing; None where D is too small for any.

    codes: one number that no query looks at, so large that the codes of the others are 0. What is left of an item is parallel to queries.
    circle: in one plane, at distances of about 64, 128 and 192. The outermost token of a list scores what the list may score at most.
    rests: beside the numbers for a prefix, which no query looks at, one that varies less: what is left of items is parallel to queries.
    """
    vectors, width = np.zeros(shape), shape[-1]
    known = prefix_width(width)
    if width < 2 or (kind == "rests" and not 0 < known < width):
        return None
    match kind:
        case "codes":
            signs = rng.choice((-1, 1), (*shape[:-1], 1)) if queries else 1
            vectors[..., 1:] = rng.integers(1, 4 if queries else 251, (*shape[:-1], 1)) * signs
            vectors[..., 0] = 0 if queries else 127 * 512  # a code is worth 512
        case "circle":
            angles, lengths = rng.uniform(0, 2 * np.pi, shape[:-1]), rng.integers(1, 4, (*shape[:-1], 1))
            vectors[..., :2] = np.rint(64 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)) * lengths
        case "rests":
            vectors[..., :known] = 0 if queries else rng.integers(-1000, 1001, (*shape[:-1], known))
            vectors[..., known] = rng.integers(1, 4 if queries else 601, shape[:-1])
        case _:
            return None
    return vectors


def assert_same(a: ZoneSelection, b: ZoneSelection, *, scores: bool = True) -> None:
    for field in dataclasses.fields(ZoneSelection):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("backend", "rescored") or (field.name == "scores" and not scores):
            continue
        assert (x is None) == (y is None), field.name
        if x is not None:
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)


@st.composite
def zone_specs(draw: st.DrawFn) -> ZoneSpec:
    bounds: Bounds = draw(st.sampled_from(("absolute", "pooled", "rank")))
    choices = (0.0, 0.1, 0.5, 1.0) if bounds != "absolute" else (-math.inf, -50.0, -1.0, 0.0, 2.0, 7.0, 1e6, math.inf)
    lo, hi = sorted((draw(st.sampled_from(choices)), draw(st.sampled_from(choices))))
    policy: Policy = draw(st.sampled_from(("hardest", "uniform", "softmax")))
    return ZoneSpec(lo=lo, hi=hi, bounds=bounds, policy=policy, seed=draw(st.sampled_from((0, 2**63 + 5))), temperature=0.7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request whose dot products are exact in float32: coordinates are small integers, so ties abound."""

    seed: int
    batch: int
    size: int
    tokens: int
    k: int
    picks: int
    anchor: Anchor
    zones: ZoneSpec | None
    special: tuple[float, ...] = ()
    half: bool = False
    excluded: int = 0
    duplicates: bool = False
    width: int = 5
    shards: int = 1
    allowed: tuple[Allowed, ...] = ()  # one for all queries, or several in turn
    vectors: Vectors = "integers"

    def request(self) -> ZoneRequest:
        rng = np.random.default_rng(self.seed)
        queries = rng.integers(-3, 4, (self.batch, self.width)).astype(np.float32)
        items = rng.integers(-3, 4, (self.size, self.tokens, self.width)).astype(np.float16 if self.half else np.float32)
        special = met_bounds(self.vectors, rng, *queries.shape, queries=True), met_bounds(self.vectors, rng, *items.shape)
        if special[0] is not None and special[1] is not None:
            queries[:], items[:] = special
        if self.duplicates:
            items[:] = items[:1]
        for value in self.special if self.size else ():  # one coordinate of one token of some items
            where = rng.integers(0, self.size, 1 + self.size // 10)
            items[where, rng.integers(0, self.tokens), rng.integers(0, self.width)] = value
        queries[: self.batch // 3] = 0.0
        anchors: dict[Anchor, Any] = {
            "best": None,
            "id": rng.integers(0, max(self.size, 1), self.batch) if self.size else None,
            "score": rng.integers(-9, 30, self.batch).astype(np.float32),
        }
        anchor = anchors[self.anchor] if self.zones else None
        exclude = rng.integers(0, self.size, (self.batch, self.excluded)) if self.size else None
        flags = [allowed_flags(self.allowed[b % len(self.allowed)], rng, self.size) for b in range(self.batch) if self.allowed]
        allowed = packed(np.array(flags, np.bool_).reshape(len(flags), self.size)) if flags else None
        if allowed is not None and len(self.allowed) == 1:
            allowed = allowed[0]
        return validated(
            queries,
            np.array_split(items, self.shards),
            k=self.k,
            anchor=anchor,
            zones=self.zones and resolve_pooled(self.zones, queries, items, anchor=anchor, exclude=exclude, allowed=allowed),
            picks=self.picks if self.zones else 0,
            counts=self.zones is not None,
            exclude=exclude,
            allowed=allowed,
            first_query=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class Way:
    """How the compiled kernels go about a request, which must change nothing."""

    threads: int = 1
    block_queries: int = 1024
    least_field: int = 1024
    sample: int = 0
    rescore_cost: int | None = 0
    instruction_set: str = ""
    screened: bool = False
    listed: float = 0.0  # share of the first shard that is in lists
    list_limit: int = 1
    prefixed: float = 0.0  # and that has prefixes

    def screen(self, request: ZoneRequest) -> Screen | None:
        if not self.screened:
            return None
        listed, width = _first(request.shards, self.listed), prefix_width(request.shards[0].shape[2])
        lists = TokenLists.build(listed, threads=self.threads, least=1)
        if lists is not None and self.prefixed and width:
            lists = lists.prefixed(listed, threads=self.threads, width=width)
        prefix = None
        if self.prefixed and width:
            prefix = Prefix.build(_first(request.shards, self.prefixed), threads=self.threads, least=1, width=width)
        return Screen(Screen.build(request.shards, lists=False, prefix=False, threads=self.threads).shards, lists, prefix)

    def select(self, request: ZoneRequest) -> ZoneSelection:
        """`request`: with this way's screen."""
        return cpu.select(
            request,
            threads=self.threads,
            block_queries=self.block_queries,
            least_field=self.least_field,
            sample=self.sample,
            rescore_cost=self.rescore_cost,
            instruction_set=self.instruction_set,
            list_limit=self.list_limit,
        )


def _first(shards: Sequence[NDArray[Any]], share: float) -> Sequence[NDArray[Any]]:
    """All items, or this share of the first shard."""
    return shards if share == 1 else [shard[: math.ceil(share * len(shard))] if at == 0 else shard[:0] for at, shard in enumerate(shards)]


def assert_equals_reference(request: ZoneRequest, way: Way) -> tuple[ZoneRequest, ZoneSelection]:
    """The request with its screen, and what the kernels found, once it is what the reference finds."""
    request = dataclasses.replace(request, screen=way.screen(request))
    found = way.select(request)
    assert_same(found, reference.select(request))
    return request, found


EVERYTHING = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax")
RANKS = ZoneSpec(lo=0.01, hi=0.3, bounds="rank", policy="uniform")


def unit_vectors(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal(shape, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
