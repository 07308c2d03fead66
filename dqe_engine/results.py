"""What the engine returns: plain frozen dataclasses, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import IndexMatches, Match


@dataclass(frozen=True)
class Hit:
    """A retrieved item. `delta`: the query's best score minus this one, so 0 for the best hit."""

    id: str
    score: float
    delta: float
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class ZoneCounts:
    """How many candidates lie in each Δ zone; together all that are not excluded or filtered out."""

    near: int
    mid: int
    easy: int


@dataclass(frozen=True)
class ZoneMembers:
    """near: "equally good", the best of the near zone; mid: "similar but different", the best of the mid zone.

    Both by score descending, at most k each; `counts` says how many there are in all.
    """

    counts: ZoneCounts
    near: tuple[Hit, ...]
    mid: tuple[Hit, ...]


@dataclass(frozen=True)
class SearchResult:
    """One query's answer.

    hits: by score descending. weights: the attribute weights that were used; predicted_weights: what the model said;
    overrides: the multipliers between the two. truncated: the text lost words to the model's limit. timings_ms: per
    stage (decode, preprocess, tokenise, vision, query, attributes, compose, search), of the whole batch that the query was in.
    """

    hits: tuple[Hit, ...]
    weights: dict[str, float]
    predicted_weights: dict[str, float]
    overrides: dict[str, float]
    truncated: bool
    zones: ZoneMembers | None
    timings_ms: dict[str, float]


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """target_tokens: (B, M, D) float32; image_tokens: (B, P, Hv) float32."""

    target_tokens: NDArray[np.float32]
    image_tokens: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EncodedQueries:
    """queries: (B, D) float32, unit norm; predicted_weights and weights (overrides applied): (B, A) float32."""

    queries: NDArray[np.float32]
    predicted_weights: NDArray[np.float32]
    weights: NDArray[np.float32]
    truncated: tuple[bool, ...]
    timings_ms: Mapping[str, float]


@dataclass(frozen=True)
class SkippedImage:
    id: str
    reason: str


@dataclass(frozen=True)
class IndexingReport:
    """added: ids that are now in the index; skipped: images that could not be read, and why."""

    added: tuple[str, ...]
    skipped: tuple[SkippedImage, ...]


def build_hits(matches: tuple[Match, ...], best: float) -> tuple[Hit, ...]:
    """Hits with Δ to the score `best`, in the order of `matches`."""
    return tuple([Hit(id, score, best - score, metadata) for id, score, metadata in matches])


def build_result_parts(found: IndexMatches) -> tuple[tuple[Hit, ...], ZoneMembers | None]:
    """Hits of one query, and its zone members where zones were counted and the picks are the best of the mid zone."""
    best = found.matches[0].score if found.matches else 0.0
    hits = build_hits(found.matches, best)
    if found.zone_counts is None:
        return hits, None
    counts = ZoneCounts(*found.zone_counts)
    # Δ falls as the score rises, so the near zone is a prefix of the ranking.
    return hits, ZoneMembers(counts, hits[: counts.near], build_hits(found.picks, best))
