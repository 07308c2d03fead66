"""The definition of zone selection: NumPy, readable, materialises the (B, N) scores. Everything else is held against it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec

from .arrays import F32, I64
from .bitmaps import unpacked
from .philox import F64, gumbel, uniform
from .request import ZoneRequest, ZoneSelection


def select(request: ZoneRequest) -> ZoneSelection:
    """Select with everything in memory; see `select_zones` for the contract."""
    scores = max_sim(request.queries, np.concatenate(request.shards))  # (B, N)
    anchors = request.anchor_scores
    if request.anchor_ids is not None:
        anchors = scores[np.arange(request.batch), request.anchor_ids]
    excluded_rows = np.repeat(np.arange(request.batch), np.diff(request.offsets))
    scores[excluded_rows, request.excluded] = np.nan  # an excluded candidate is one without a score
    if request.allowed is not None:
        scores[np.broadcast_to(~unpacked(request.allowed, request.size), scores.shape)] = np.nan  # and so is one that is not allowed
    order = np.argsort(-scores, axis=1, kind="stable")  # (B, N); stable: ties by id; NaN last
    valid = np.count_nonzero(~np.isnan(scores), axis=1)  # (B,)
    top_scores, top_ids = _padded(scores, [row[: min(n, request.k)] for row, n in zip(order, valid, strict=True)], request.k)
    if request.zones is None:
        return ZoneSelection(
            scores=top_scores,
            ids=top_ids,
            counts=None,
            picks=None,
            pick_scores=None,
            lo=None,
            hi=None,
            anchor_scores=None,
            backend="reference",
        )

    if anchors is None:
        anchors = score_at_rank(scores, order, valid, 0.0)
    lo, hi = resolve_bounds(request.zones, anchors, scores, order, valid)
    with np.errstate(invalid="ignore"):  # inf - inf: NaN, in no zone
        delta = anchors[:, None] - scores  # (B, N) float32
    mid = (delta >= lo[:, None]) & (delta <= hi[:, None])
    zones = (delta < lo[:, None], mid, delta > hi[:, None])
    picks = pick_scores = None
    if request.picks:
        pick_scores, picks = _pick(request, request.zones, scores, mid)
    return ZoneSelection(
        scores=top_scores,
        ids=top_ids,
        counts=np.stack([np.count_nonzero(zone, axis=1) for zone in zones], axis=1).astype(np.int64) if request.counts else None,
        picks=picks,
        pick_scores=pick_scores,
        lo=lo,
        hi=hi,
        anchor_scores=anchors,
        backend="reference",
    )


def max_sim(queries: F32, items: NDArray[np.float32 | np.float16]) -> F32:
    """s(b, i) = max over m of <q_b, t_im>: (B, D) and (N, M, D) to (B, N) float32. A NaN in any token makes the score NaN."""
    size, tokens, width = items.shape
    with np.errstate(invalid="ignore", over="ignore"):
        dots = queries @ items.astype(np.float32, copy=False).reshape(size * tokens, width).T  # (B, N * M)
    scores: F32 = dots.reshape(len(queries), size, tokens).max(axis=2)
    return scores


def score_at_rank(scores: F32, order: I64, valid: I64, fraction: float) -> F32:
    """(B,) the score of the candidate at rank floor(fraction * (n - 1)) of n, best first; NaN where n = 0."""
    rank = np.floor(fraction * (np.maximum(valid, 1) - 1)).astype(np.int64)
    result = np.full(len(scores), np.nan, np.float32)
    (rows,) = np.nonzero(valid)
    result[rows] = scores[rows, order[rows, rank[rows]]]
    return result


def resolve_bounds(spec: ZoneSpec, anchors: F32, scores: F32, order: I64, valid: I64) -> tuple[F32, F32]:
    """(B,) absolute lo and hi. A rank p is the Δ of the candidate at rank floor(p * (n - 1)) of the query's own list.

    That is an existing value, so a mid zone by rank always holds its two ends.
    """
    if spec.bounds == "absolute":
        return np.full(len(anchors), spec.lo, np.float32), np.full(len(anchors), spec.hi, np.float32)
    with np.errstate(invalid="ignore"):
        return anchors - score_at_rank(scores, order, valid, spec.lo), anchors - score_at_rank(scores, order, valid, spec.hi)


def pick_keys(spec: ZoneSpec, scores: F32, query: int, ids: I64) -> F64:
    """The f64 keys whose top P are picked: `scores` of the items `ids` for the query in row `query`."""
    if spec.policy == "hardest":
        return scores.astype(np.float64)
    u = uniform(spec.seed, np.asarray(query, np.int64), ids)
    return u if spec.policy == "uniform" else scores.astype(np.float64) / spec.temperature + gumbel(u)


def _pick(request: ZoneRequest, spec: ZoneSpec, scores: F32, mid: NDArray[np.bool_]) -> tuple[F32, I64]:
    chosen = []
    for query, inside in enumerate(mid):
        (ids,) = np.nonzero(inside)
        keys = pick_keys(spec, scores[query, ids], request.first_query + query, ids)
        chosen.append(ids[np.lexsort((ids, -keys))[: request.picks]])
    return _padded(scores, chosen, request.picks)


def _padded(scores: F32, chosen: list[I64], width: int) -> tuple[F32, I64]:
    """Scores and ids of the chosen items of each row, padded to (B, width) with -inf and -1."""
    out_scores = np.full((len(scores), width), -np.inf, np.float32)
    out_ids = np.full((len(scores), width), -1, np.int64)
    for row, ids in enumerate(chosen):
        out_ids[row, : len(ids)] = ids
        out_scores[row, : len(ids)] = scores[row, ids]
    return out_scores, out_ids
