"""The composed query q = unit(q0 + sum_a w_a s_a) (paper section on learnable attribute weights), and weight overrides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import InputError


def compose_query(base_query: NDArray[np.float32], sub_queries: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """unit(q0 + sum_a w_a s_a), summed in float64.

    base_query: (B, D); sub_queries: (B, A, D); weights: (B, A). Returns (B, D) float32, unit norm; zero where the sum is
    zero, NaN where it is not finite. Raises InputError when the shapes disagree.
    """
    batch, dim = base_query.shape if base_query.ndim == 2 else (-1, -1)
    if batch < 0 or sub_queries.ndim != 3 or sub_queries.shape != (*weights.shape, dim) or weights.shape[0] != batch:
        raise InputError(
            f"expected base_query (B, D), sub_queries (B, A, D) and weights (B, A), got "
            f"{base_query.shape}, {sub_queries.shape} and {weights.shape}"
        )
    total = base_query + np.einsum("ba,bad->bd", weights, sub_queries, dtype=np.float64)  # (B, D)
    norm = np.sqrt(np.einsum("bd,bd->b", total, total))
    norm[norm == 0] = 1  # zero stays zero
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, which the caller sees
        unit: NDArray[np.float64] = total / norm[:, None]
    return unit.astype(np.float32)


def unknown_attribute(name: str, names: Sequence[str]) -> InputError:
    """The error for a weight of an attribute that is none of the model's `names`."""
    known = f"this model has {', '.join(names)}" if names else "this model has no attributes; leave the weights out"
    return InputError(f"unknown attribute {name!r}; {known}")


def apply_overrides(weights: NDArray[np.float32], names: Sequence[str], overrides: Mapping[str, float]) -> NDArray[np.float32]:
    """Predicted weights times a multiplier per attribute name: 1 keeps, 0 switches off, 2 doubles.

    weights: (B, A) in the order of `names`; a new (B, A) float32 array is returned. Raises InputError for an unknown
    name and for a multiplier that is negative, not a finite number, or beyond float32 in the product.
    """
    if weights.ndim != 2 or weights.shape[1] != len(names):
        raise InputError(f"expected weights of shape (B, {len(names)}), got {weights.shape}")
    if not overrides:
        return weights.astype(np.float32)  # a copy
    factors = np.ones(len(names), np.float64)
    for name, factor in overrides.items():
        if name not in names:
            raise unknown_attribute(name, names)
        if isinstance(factor, bool) or not isinstance(factor, int | float | np.number) or not math.isfinite(factor) or factor < 0:
            raise InputError(f"weight of {name!r}: expected a finite multiplier of at least 0, got {factor!r}")
        factors[names.index(name)] = factor
    scaled = weights.astype(np.float64) * factors
    if scaled.size and scaled.max() > np.finfo(np.float32).max:
        raise InputError("attribute weights are beyond what float32 holds; use smaller multipliers")
    return scaled.astype(np.float32)
