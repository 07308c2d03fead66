"""From composed queries to results: one search of the index for those that go together, hits in their zones, explanations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .contracts.zones import ZoneSpec
from .encoder import Clock, Composed, Prepared, QueryEncoder
from .results import Explanation, Hit, IndexState, SearchResult, ZoneMembers, build_result_parts


class _Found(NamedTuple):
    hits: tuple[Hit, ...]
    zones: ZoneMembers | None
    exact: bool
    lost: tuple[str, ...]


class Answerer:
    """What a bundle's engine does with prepared queries. Threads may share it; each query brings the snapshot that it is answered from.

    `threads`: the most threads of a search, 0 for one per processor.
    """

    def __init__(self, bundle: Bundle, encoder: QueryEncoder, threads: int) -> None:
        self.bundle = bundle
        self._encoder, self._threads = encoder, threads

    def answer(self, prepared: Sequence[Prepared], clock: Clock) -> tuple[SearchResult, ...]:
        """A result for each query, in their order. Raises what `QueryEncoder.compose` and the index's `search` do."""
        composed = self._encoder.compose(prepared, clock)
        found = self._search(prepared, composed)
        clock.lap("search")
        return tuple(self._result(one, made, found[b], clock) for b, (one, made) in enumerate(zip(prepared, composed, strict=True)))

    def _search(self, prepared: Sequence[Prepared], composed: Sequence[Composed]) -> dict[int, _Found]:
        """What the index says, by place: one search for queries of the same snapshot, filter and zones."""
        groups: dict[Any, list[int]] = {}
        for b, one in enumerate(prepared):
            query = one.query
            spec = self._zone_spec(query.zones)
            digest = None if one.filter is None else one.filter.digest
            groups.setdefault((one.snapshot, digest, spec), []).append(b)
        found: dict[int, _Found] = {}
        for (_, _, spec), rows in groups.items():
            queries = [prepared[b].query for b in rows]
            most = max(query.k + query.offset for query in queries)
            matches = prepared[rows[0]].snapshot.search(
                np.stack([composed[b].vector for b in rows]), most, exclude=[query.excluded() for query in queries],
                filter=prepared[rows[0]].filter, zones=spec, picks=max(query.k for query in queries) if spec else 0, threads=self._threads,
            )  # fmt: skip
            for b, query, ranking in zip(rows, queries, matches, strict=True):
                kept = replace(ranking, matches=ranking.matches[: query.k + query.offset], picks=ranking.picks[: query.k])
                parts = build_result_parts(kept, offset=query.offset, minimum_score=query.minimum_score)
                found[b] = _Found(*parts, ranking.exact, ranking.lost)
        return found

    def _result(self, prepared: Prepared, composed: Composed, found: _Found, clock: Clock) -> SearchResult:
        hits, query, names = found.hits, prepared.query, self.bundle.vocabulary.names
        if query.explain:
            stored = prepared.snapshot.tokens_of([hit.id for hit in hits])
            made = [self._explanation(prepared, composed, tokens) for tokens in stored]
            hits = tuple([replace(hit, explanation=one) for hit, one in zip(hits, made, strict=True)])
        weights = {} if query.text is None else dict(zip(names, composed.weights.tolist(), strict=True))
        predicted = {} if query.text is None else dict(zip(names, composed.predicted.tolist(), strict=True))
        return SearchResult(
            hits=hits,
            mode=query.mode,
            weights=weights,
            predicted_weights=predicted,
            overrides={name: float(value) for name, value in query.weights.items()},
            truncated=prepared.truncated,
            unknown_words=prepared.unknown_words,
            zones=found.zones,
            timings_ms=dict(clock.timings_ms),
            index=IndexState(prepared.snapshot.count, prepared.snapshot.revision),
            exact=found.exact,
            lost=found.lost,
        )

    def _explanation(self, prepared: Prepared, composed: Composed, stored: NDArray[Any]) -> Explanation:
        tokens = stored.astype(np.float64)  # (M, D)
        best = int((tokens @ composed.vector).argmax())
        token, base = tokens[best], composed.base.astype(np.float64)
        names = self.bundle.vocabulary.names if prepared.query.text is not None else ()
        sub_queries = dict(zip(names, composed.sub_queries.astype(np.float64), strict=False))
        parts = {name: float(weight) * part for (name, part), weight in zip(sub_queries.items(), composed.weights, strict=False)}
        total = base + sum(parts.values(), np.zeros_like(token))
        length = float(np.linalg.norm(total)) or 1.0
        if prepared.query.unlike:
            length *= float(np.linalg.norm(total / length - composed.unlike)) or 1.0
        first = float(np.linalg.norm(total)) or 1.0
        return Explanation(
            token=best,
            base=float(base @ token) / length,
            attributes={name: float(part @ token) / length for name, part in parts.items()},
            unlike=-float(composed.unlike @ token) * first / length,
            base_similarity=_cosine(base, token),
            similarities={name: _cosine(part, token) for name, part in sub_queries.items()},
        )

    def _zone_spec(self, zones: bool | ZoneSpec) -> ZoneSpec | None:
        if zones is False:
            return None
        spec = self.bundle.manifest.zones if zones is True else zones
        return msgspec.structs.replace(spec, policy="hardest")  # for people: the best of the mid zone, not a sample of it


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0
