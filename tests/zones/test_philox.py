"""The random numbers: published vectors, the stated recipe in plain integers, and the distributions of the picks."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import select_zones
from dqe_engine.zones.philox import gumbel, log, philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (np.array([word], np.uint32) for word in counter)
    assert tuple(int(word[0]) for word in philox4x32((c0, c1, c2, c3), key)) == expected


def uniform_in_integers(seed: int, query: int, item: int) -> float:
    counter, key = [item % 2**32, item >> 32, query % 2**32, query >> 32], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return (2 * ((counter[1] * 2**32 + counter[0]) >> 12) + 1) / 2**53


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_uniform_follows_its_recipe(seed: int) -> None:
    items = np.array([0, 1, 2**32 - 1, 2**32, 2**40 + 7])
    for query in (0, 1, 2**33):
        assert uniform(seed, np.array([query]), items).tolist() == [uniform_in_integers(seed, query, int(item)) for item in items]


def test_logarithm_is_within_one_unit_of_the_true_one(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.random(10_000) + 2.0**-53, [2.0**-53, 1 - 2.0**-53, 0.5, 1.0, 36.7, math.sqrt(0.5), math.sqrt(2)]])
    x = np.concatenate([x, rng.exponential(1, 10_000) + 1e-16])
    truth = np.log(x.astype(np.longdouble))
    assert np.all(np.abs(log(x) - truth) <= np.spacing(np.abs(truth.astype(np.float64))))


def test_extreme_uniforms_give_finite_gumbels() -> None:
    assert np.isfinite(gumbel(np.array([2.0**-53, 1 - 2.0**-53]))).all()


def chi_square(observed: Counter[Any], expected: dict[Any, float], trials: int) -> float:
    assert set(observed) <= set(expected)
    return sum((observed[outcome] - trials * p) ** 2 / (trials * p) for outcome, p in expected.items())


TRIALS = 8_000
SCORES = np.array([0.50, 0.45, 0.40, 0.30, 0.10], np.float32)
TEMPERATURE = 0.2
LIMIT = 63.0  # 20 ordered pairs: chi-square with 19 degrees of freedom exceeds it with probability 1.3e-6


@cache
def pairs(policy: Any, backend: Any) -> Counter[tuple[int, ...]]:
    """How often each ordered pair was picked from five items with the given scores, over many identical queries."""
    queries = np.ones((TRIALS, 1), np.float32)
    spec = ZoneSpec(lo=-1, hi=1, policy=policy, temperature=TEMPERATURE, seed=7)
    result = select_zones(queries, SCORES[:, None].copy(), zones=spec, picks=2, backend=backend)
    assert result.picks is not None
    return Counter(map(tuple, result.picks.tolist()))


def without_replacement(weights: np.ndarray) -> dict[tuple[int, int], float]:
    p = weights / weights.sum()
    return {(i, j): float(p[i] * p[j] / (1 - p[i])) for i, j in permutations(range(len(p)), 2)}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_picks_follow_their_policy(backend: str) -> None:
    softmax, flat = without_replacement(np.exp(SCORES.astype(np.float64) / TEMPERATURE)), without_replacement(np.ones(5))
    assert chi_square(pairs("softmax", backend), softmax, TRIALS) < LIMIT
    assert chi_square(pairs("uniform", backend), flat, TRIALS) < LIMIT
    assert chi_square(pairs("softmax", backend), flat, TRIALS) > 10 * LIMIT  # the test tells them apart
    assert chi_square(pairs("uniform", backend), softmax, TRIALS) > 10 * LIMIT
    assert pairs("hardest", backend) == {(0, 1): TRIALS}
