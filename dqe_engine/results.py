"""What the engine returns: plain frozen dataclasses, ready for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .index import IndexMatches, Match
from .query import Mode

Zone = Literal["near", "mid", "easy"]


@dataclass(frozen=True)
class Explanation:
    """What a hit's score is made of, at the item's target token that matched best (`token`).

    base: the part of the base query (for an image alone, the whole score); attributes: the part of each, its weight times its sub-query's
    product with the token; unlike: what unwanted examples took away, usually at most 0. The parts add up to the score. similarities:
    cosines of the token with each sub-query, whatever the weights; base_similarity: with the base query.
    """

    token: int
    base: float
    attributes: dict[str, float]
    unlike: float
    base_similarity: float
    similarities: dict[str, float]


@dataclass(frozen=True)
class Hit:
    """A retrieved item. `delta`: the query's best score minus this one, so 0 for the best hit. `zone` and `explanation`: if the query asked
    for them."""

    id: str
    score: float
    delta: float
    metadata: dict[str, Any] | None = None
    zone: Zone | None = None
    explanation: Explanation | None = None


@dataclass(frozen=True)
class ZoneCounts:
    """How many candidates lie in each Δ zone; together all that are not excluded or filtered out."""

    near: int
    mid: int
    easy: int


@dataclass(frozen=True)
class ZoneMembers:
    """The best items of the near and of the mid zone.

    `near` are equally good items, `mid` are similar but different ones. Both are sorted by score descending, hold at most k items, and
    respect the minimum score. `counts` says how many items each zone has in all. `near` belongs to the page that was asked for; `mid` is
    the same on every page.
    """

    counts: ZoneCounts
    near: tuple[Hit, ...]
    mid: tuple[Hit, ...]


@dataclass(frozen=True)
class IndexState:
    """The number of items that can be found, and the revision of the save that holds them: None while changes are unsaved."""

    items: int
    revision: str | None


@dataclass(frozen=True)
class SearchResult:
    """One query's answer.

    - `hits`: the items found, by score descending, from `offset` on.
    - `mode`: "composed", "image" or "text" (see `Query`).
    - `weights`: the attribute weights that were used; `predicted_weights`: those that the model predicted; `overrides`: the multipliers
      between the two.
    - `truncated`: the text was longer than the model reads.
    - `unknown_words`: words that the model does not know; it reads all of them as one and the same word.
    - `zones`: the best of each zone, None unless the query asked for zones.
    - `timings_ms`: milliseconds by stage (decode, preprocess, tokenise, vision, query, attributes, compose, search), of the whole batch
      that the query was in; 0 for a stage whose result was remembered.
    - `index`: the state of the index that was searched.
    - `exact`: whether the hits are provably the best of all items; always true for an index in one process.
    - `lost`: shards of a sharded index that gave no answer.
    """

    hits: tuple[Hit, ...]
    mode: Mode
    weights: dict[str, float]
    predicted_weights: dict[str, float]
    overrides: dict[str, float]
    truncated: bool
    unknown_words: tuple[str, ...]
    zones: ZoneMembers | None
    timings_ms: dict[str, float]
    index: IndexState = IndexState(0, None)
    exact: bool = True
    lost: tuple[str, ...] = ()


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


_KINDS_OF_REASONS = {
    "not an image": "not an image", "damaged or truncated": "damaged", "the limit": "over a limit", "no such image": "gone meanwhile",
    "ermission denied": "permission denied", "not valid Unicode": "with an id that is not Unicode",
}  # fmt: skip
"""By words in an image's reason. Reasons come from other processes too, as text."""


@dataclass(frozen=True)
class SkippedImage:
    id: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason in a word or two, to count by."""
        return next((kind for words, kind in _KINDS_OF_REASONS.items() if words in self.reason), "not readable")


@dataclass(frozen=True)
class IndexingReport:
    """What became of each image, by id.

    added: new. changed: embedded anew, since its content differs, or, for `rehash`, was never recorded. described: other metadata
    and nothing else. unchanged: as they were. unrecorded: those of `unchanged` that were indexed before content was recorded, so
    that nobody compared them. skipped: could not be read, and why. pruned: removed, since their images are gone. passed_over: how
    many files of the folder are no images, by reason.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    described: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    unrecorded: tuple[str, ...] = ()
    skipped: tuple[SkippedImage, ...] = ()
    pruned: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """`12 added, 3 changed, 1 with other metadata, 985 unchanged, 2 skipped (1 damaged, 1 not an image), 0 pruned`."""
        unchanged = f"{len(self.unchanged)} unchanged"
        if self.unrecorded:
            unchanged += f" (of which {len(self.unrecorded)} were indexed before content was recorded and not compared)"
        kinds = Counter(image.kind for image in self.skipped) + Counter(self.passed_over)
        skipped = f"{kinds.total()} skipped"
        if kinds:
            skipped += f" ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))})"
        counts = f"{len(self.added)} added, {len(self.changed)} changed, {len(self.described)} with other metadata"
        return f"{counts}, {unchanged}, {skipped}, {len(self.pruned)} pruned"


def build_hits(matches: Sequence[Match], best: float) -> tuple[Hit, ...]:
    """Hits with Δ to the score `best`, in the order of `matches`."""
    return tuple([Hit(id, score, best - score, metadata) for id, score, metadata in matches])


def build_result_parts(
    found: IndexMatches, *, offset: int = 0, minimum_score: float | None = None
) -> tuple[tuple[Hit, ...], ZoneMembers | None]:
    """Hits of one query from `offset` on, and its zone members where zones were counted and the picks are the best of the mid zone."""
    best = found.matches[0].score if found.matches else 0.0
    ranked = [match for match in found.matches if minimum_score is None or match.score >= minimum_score]
    hits = build_hits(ranked[offset:], best)
    if found.zone_counts is None:
        return hits, None
    counts = ZoneCounts(*found.zone_counts)
    # Δ falls as the score rises, so each zone is a stretch of the ranking.
    zones: list[Zone] = [
        "near" if rank < counts.near else "mid" if rank < counts.near + counts.mid else "easy" for rank in range(offset, offset + len(hits))
    ]
    hits = tuple([replace(hit, zone=zone) for hit, zone in zip(hits, zones, strict=True)])
    near = tuple([hit for hit in hits if hit.zone == "near"])
    picks = [pick for pick in found.picks if minimum_score is None or pick.score >= minimum_score]
    mid = tuple([replace(hit, zone="mid") for hit in build_hits(picks, best)])
    return hits, ZoneMembers(counts, near, mid)
