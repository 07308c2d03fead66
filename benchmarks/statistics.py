"""How far a figure can be trusted: bands from the spread between blocks of a run, and percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
LEAST_BLOCKS = 3

_STUDENT_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t by degrees of freedom; SciPy is not needed for ten numbers."""


def band(medians: Sequence[float], *, around: float) -> tuple[float, float] | None:
    """The 95 % prediction interval for one more block, times e^(±t s √(1 + 1/n)) of `around`; s of the logarithms of `medians`.

    A bootstrap of all samples says how well the median of *this* run is known. Another run meets another state of the machine
    (frequency, neighbours, memory layout), which lasts longer than a block but not as long as a run; so another run is taken to
    differ as much as another block would. None for fewer than three blocks, or times that are not positive.
    """
    if len(medians) < LEAST_BLOCKS or min(medians) <= 0 or around <= 0:
        return None
    spread = student_95(len(medians) - 1) * float(np.std(np.log(medians), ddof=1)) * math.sqrt(1 + 1 / len(medians))
    return around * math.exp(-spread), around * math.exp(spread)


def student_95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t."""
    return _STUDENT_95[freedom] if freedom < len(_STUDENT_95) else 1.96 + 2.5 / freedom


def block_medians(rng: np.random.Generator, contenders: Sequence[Sequence[Samples]], resamples: int) -> list[Samples]:
    """Medians (resamples,) of each contender: blocks drawn with replacement, the same for all, then runs within each block."""
    count = len(contenders[0])
    out = np.empty((len(contenders), resamples))
    for draw in range(resamples):
        chosen = rng.integers(0, count, count)
        for row, blocks in enumerate(contenders):
            out[row, draw] = np.median(np.concatenate([rng.choice(blocks[b], len(blocks[b])) for b in chosen]))
    return list(out)


def percentiles(samples: Sequence[float] | Samples) -> dict[str, float]:
    """p50, p95 and p99, in the unit of the samples."""
    values = np.percentile(samples, (50, 95, 99))
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score method: (0, 1) for no trials."""
    if trials == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
