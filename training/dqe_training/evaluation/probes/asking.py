"""What probes ask with: a ranked query set, a model that encodes other queries, and what labels tell of the gallery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones import select_zones

from ...data.grammars import Grammar, Values, grammar_of
from ...data.queries import DEPTH, QuerySet
from ...data.records import TripletRecord
from ..metrics import jaccard
from ..protocol import Embeddings, EvaluationSet

TOP = 10
"""How deep the probes look."""

Encode = Callable[[Sequence[str | None], Sequence[str]], NDArray[np.float32]]
"""Composed queries (N, D) of references, by gallery id, and texts. None: the neutral image."""


@dataclass(frozen=True)
class Labels:
    """What is known of a query set beyond its targets. Rows are the queries', but for `attributes`, which are the gallery's.

    attributes: by image, empty where it has no labels. relevant: every valid answer; None where it is not known of all queries.
    """

    records: tuple[TripletRecord, ...]
    attributes: tuple[Values, ...]
    relevant: tuple[tuple[int, ...], ...] | None
    grammar: Grammar

    @classmethod
    def of(cls, evaluation: EvaluationSet) -> Labels:
        return cls(evaluation.records, evaluation.attributes, evaluation.relevant, grammar_of(evaluation.attributes))

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes that images are labelled with, in the order of their first labels."""
        return tuple(dict.fromkeys(name for row in self.attributes for name in row))


@dataclass(frozen=True)
class Asking:
    """A query set with its answers, and the means to ask for more. `neutral`: what stands for an image that says nothing, in words."""

    queries: QuerySet
    found: Embeddings
    encode: Encode
    neutral: str
    labels: Labels | None = None

    def rank(self, references: Sequence[str | None], texts: Sequence[str], excluded: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """(N, DEPTH) gallery positions, padded with -1, exact; row n leaves out the positions `excluded[n]`. A pair that occurs
        twice is encoded once."""
        if not texts:
            return np.empty((0, DEPTH), np.int64)
        pairs = list(dict.fromkeys(zip(references, texts, strict=True)))
        pairs.sort(key=lambda pair: pair[0] or "")  # queries of one reference side by side: its image is encoded once
        row = {pair: at for at, pair in enumerate(pairs)}
        embedded = self.encode([reference for reference, _ in pairs], [text for _, text in pairs])
        asked = embedded[[row[pair] for pair in zip(references, texts, strict=True)]]
        return select_zones(asked, self.found.target_tokens, k=DEPTH, exclude=excluded if any(map(len, excluded)) else None).ids

    @property
    def excluded(self) -> list[list[int]]:
        """By query, what its own ranking leaves out."""
        return self.queries.excluded or [[] for _ in self.queries.queries]


def overlap(one: NDArray[np.int64], other: NDArray[np.int64], depth: int = TOP) -> NDArray[np.float64]:
    """(N,) Jaccard index of the first `depth` of rankings (N, K), padded with -1: images in both over images in either; 1 for none."""
    sides = [[set(row) - {-1} for row in ranked[:, :depth].tolist()] for ranked in (one, other)]
    return np.asarray([jaccard(a, b) for a, b in zip(*sides, strict=True)], np.float64)
