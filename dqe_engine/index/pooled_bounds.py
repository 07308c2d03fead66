"""One vector an item whose inner product with a query is never below the item's score, so that a database of vectors can certify answers.

An item has tokens t_1 … t_M, a centre c (their mean, rounded to float32) and a radius r = max |t_m - c|. For every query q

    score(q) = max_m <q, t_m> = <q, c> + max_m <q, t_m - c> <= <q, c> + |q| r        (Cauchy-Schwarz)

which is the inner product of the *extended* vectors (q, |q|) and (c, r), both of n = D + 1 numbers. Whoever returns the vectors with the
largest inner products thus returns upper bounds of scores, largest first: what is left out scores no more than the last bound that came.

Rounding. Let u = 2^-24 and g = n u / (1 - n u). A sum of n products in float32, in any order, with or without fused multiply-add, is off by
at most g times the product of the norms (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1). So with rho for r,

    a score of the kernels    <= <q, c> + |q| r + g |q| (|c| + r)              since |t_m| <= |c| + r
    a product of the database >= <q, c> + |q| rho - sqrt(2) g |q| (|c| + rho)  since |(q, |q|)| = sqrt(2) |q|, |(c, rho)| <= |c| + rho

and the second is at least the first where rho (1 - 2 g) >= r + 3 g (|c| + r); 2 stands in for sqrt(2), so that the rounding of |q| and of
the norms is covered too. A larger rho only helps, so it is rounded up; |q| is as well. Products below the smallest normal float32 lose up
to n 2^-149 in all, which `LEAST_NORM` and the 1e-30 that is added to rho make up for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LEAST_NORM = 1e-6
"""A query that is shorter, and not zero, is answered without a certificate."""
MOST_NORM = 1e15
"""Of tokens and queries: the squares of longer ones would come near what float32 holds."""
_UNIT = 2.0**-24


def bound_vectors(tokens: NDArray[Any]) -> F32:
    """(n, D + 1): the extended vector (c, rho) of each item. tokens: (n, M, D), float32 or float16, finite, norms up to `MOST_NORM`."""
    exact = tokens.astype(np.float64)
    centres = exact.mean(axis=1).astype(np.float32)  # (n, D)
    rounded = centres.astype(np.float64)
    radii = np.linalg.norm(exact - rounded[:, None], axis=2).max(axis=1) * (1 + 1e-12)  # norms in float64 are off by less
    g = _error(tokens.shape[2] + 1)
    lengths = np.linalg.norm(rounded, axis=1) * (1 + 1e-12)
    rho = (radii + 3 * g * (lengths + radii)) / (1 - 2 * g) + 1e-30
    return np.concatenate([centres, _up(rho)[:, None]], axis=1)


def extended_queries(queries: F32) -> F32:
    """(B, D + 1): (q, |q|) of each query."""
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1) * (1 + 1e-12)
    return np.concatenate([queries, _up(lengths)[:, None]], axis=1)


def believable(products: F64, query: F32, vectors: F32) -> bool:
    """Whether these are the inner products of an extended query (D + 1,) with extended vectors (n, D + 1), but for the rounding of float32.

    A database that keeps vectors in fewer bits, or was given others, is found out."""
    exact = vectors.astype(np.float64) @ query.astype(np.float64)
    room = _error(len(query)) * np.linalg.norm(query.astype(np.float64)) * np.linalg.norm(vectors.astype(np.float64), axis=1)
    return bool((np.abs(products - exact) <= 1.01 * room + 1e-37).all())


def _error(products: int) -> float:
    """g: the relative error of a float32 sum of so many products."""
    return products * _UNIT / (1 - products * _UNIT)


def _up(values: F64) -> F32:
    """Rounded to float32 and not below."""
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded).astype(np.float32)
