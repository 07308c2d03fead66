"""Counter-based random numbers, specified to the bit so that NumPy, C++ and CUDA draw the same.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). `cpp_ext/philox.hpp` is the same
recipe: only 32-bit integer operations and correctly rounded f64 +, -, *, / without fused multiply-add.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
F64 = NDArray[np.float64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SQRT_HALF = 0.70710678118654752440
# Minimax coefficients of fdlibm's e_log.c, whose error is below one unit in the last place.
_LOG_COEFFICIENTS = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)


def philox4x32(counter: tuple[U32, U32, U32, U32], key: tuple[int, int]) -> tuple[U32, U32, U32, U32]:
    """Ten rounds over arrays of counter words (broadcast together); returns the four words of each 128-bit block."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint32).astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT32) ^ c1 ^ np.uint64(k0),
            product1 & _LOW32,
            (product0 >> _SHIFT32) ^ c3 ^ np.uint64(k1),
            product0 & _LOW32,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def uniform(seed: int, query: NDArray[np.int64], item: NDArray[np.int64]) -> F64:
    """u(seed, b, i) in the open interval (0, 1), f64, for the query rows b and item positions i (broadcast together).

    Key: the low and high word of `seed`. Counter: low and high word of i, then of b. With x0 and x1 the first two words
    out, u = (2 * ((x1 * 2**32 + x0) >> 12) + 1) * 2**-53: an odd multiple of 2**-53, so exact, never 0 and never 1.
    """
    i, b = (np.asarray(value).astype(np.uint64) for value in (item, query))
    words = ((i & _LOW32), (i >> _SHIFT32), (b & _LOW32), (b >> _SHIFT32))
    counter = tuple(np.asarray(word, np.uint64).astype(np.uint32) for word in words)
    x0, x1, _, _ = philox4x32((counter[0], counter[1], counter[2], counter[3]), (seed & 0xFFFFFFFF, seed >> 32))
    bits = ((x1.astype(np.uint64) << _SHIFT32) | x0) >> np.uint64(12)
    return (2 * bits + np.uint64(1)).astype(np.float64) * 2.0**-53


def log(x: F64) -> F64:
    """Natural logarithm of positive, normal, finite x: fdlibm's e_log.c without its special cases.

    Written out because libm, NumPy and CUDA differ in the last bit, and a pick must not depend on that.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    f = np.where(small, 2.0 * mantissa, mantissa) - 1.0  # in [sqrt(1/2) - 1, sqrt(2) - 1)
    e = (exponent - small).astype(np.float64)
    s = f / (2.0 + f)
    z = s * s
    r = np.zeros_like(z)
    for coefficient in reversed(_LOG_COEFFICIENTS):
        r = z * (coefficient + r)
    half_square = 0.5 * f * f
    return e * _LN2_HIGH - ((half_square - (s * (half_square + r) + e * _LN2_LOW)) - f)


def gumbel(u: F64) -> F64:
    """Standard Gumbel variate of a uniform one: -log(-log u)."""
    return -log(-log(u))
