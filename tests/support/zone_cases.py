"""Requests for the kernels of zones whose answers are known to the bit, and what compares answers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import ZoneSelection, resolve_pooled
from dqe_engine.zones.bitmaps import packed
from dqe_engine.zones.request import ZoneRequest, validated

Anchor = Literal["best", "id", "score"]
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


def assert_same(a: ZoneSelection, b: ZoneSelection, *, scores: bool = True) -> None:
    for field in dataclasses.fields(ZoneSelection):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("backend", "rescored") or (field.name == "scores" and not scores):
            continue
        assert (x is None) == (y is None), field.name
        if x is not None:
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)


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

    def request(self) -> ZoneRequest:
        rng = np.random.default_rng(self.seed)
        queries = rng.integers(-3, 4, (self.batch, self.width)).astype(np.float32)
        items = rng.integers(-3, 4, (self.size, self.tokens, self.width)).astype(np.float16 if self.half else np.float32)
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


EVERYTHING = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax")
RANKS = ZoneSpec(lo=0.01, hi=0.3, bounds="rank", policy="uniform")


def unit_vectors(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal(shape, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
