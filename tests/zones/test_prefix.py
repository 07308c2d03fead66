"""Prefixes of tokens in a rotated basis: their bounds hold, they are kept where they pay, and nothing depends on them but time."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.thorough import cases as random_cases

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import Screen, ZoneSelection, cpu
from dqe_engine.zones.prefix import NoPrefix, Prefix
from dqe_engine.zones.request import ZoneRequest, validated


@cache
def _directions(width: int, clusters: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A basis and centres in it: the same for items and queries."""
    rng = np.random.default_rng(width)
    return np.linalg.qr(rng.standard_normal((width, width))).Q, rng.standard_normal((clusters, width))


def decaying(rng: np.random.Generator, *shape: int, power: float = 1.0, clusters: int = 50) -> NDArray[np.float32]:
    """(..., D) unit vectors around some directions; the variance of their principal components falls as a power."""
    width = shape[-1]
    basis, centres = _directions(width, clusters)
    own = 0.6 * rng.standard_normal(shape)
    vectors = ((centres[rng.integers(clusters, size=shape[:-1])] + own) * np.arange(1, width + 1) ** (-power / 2)) @ basis
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors.astype(np.float32)


def request_of(queries: NDArray[np.float32], items: Any, screen: Screen | None, **options: Any) -> ZoneRequest:
    defaults: dict[str, Any] = {"k": 10, "anchor": None, "zones": None, "picks": 0, "counts": False, "exclude": None}
    return validated(queries, items, **(defaults | options), screen=screen)


def same(one: ZoneSelection, other: ZoneSelection) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(ZoneSelection)]
    arrays = [(x, y) for x, y in pairs if isinstance(x, np.ndarray)]
    assert len(arrays) >= 2
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in arrays)


def built(items: Any, width: int) -> Prefix:
    prefix = Prefix.build(items if isinstance(items, tuple) else (items,), threads=2, least=1, width=width)
    assert prefix is not None
    return prefix


def numbers_of(prefix: Prefix) -> NDArray[np.float32]:
    """(blocks, 4), a view: scales, errors, norms and units of rests."""
    return prefix.blocks[:, :16].view(np.float32)


def with_numbers(prefix: Prefix, which: int, factor: float) -> Prefix:
    changed = Prefix(prefix.covered, prefix.axes, prefix.blocks.copy())
    numbers_of(changed)[:, which] *= np.float32(factor)
    return changed


@pytest.mark.parametrize("width", [16, 17, 100, 257, 768])
@pytest.mark.parametrize("lengths", [False, True])
def test_no_row_scores_more_than_its_prefix_says(width: int, lengths: bool, rng: np.random.Generator) -> None:
    """For queries without codes, whose own part of the bound is exact."""
    items = decaying(rng, 333, 1, width)
    if lengths:
        items *= np.exp(rng.normal(0, 3, (333, 1, 1))).astype(np.float32)
    items[50], items[6, 0, 0], items[7] = 0, np.nan, 1e20
    size = 16 * min(3, width // 16)
    prefix = built(items, size)
    axes = prefix.axes.astype(np.float64)
    np.testing.assert_allclose(axes @ axes.T, np.eye(size), atol=1e-6, rtol=0)
    scales, errors, norms, units = np.repeat(numbers_of(prefix), 16, axis=0)[:333].astype(np.float64).T
    rests = prefix.blocks[:, 16:48].view(np.uint16).ravel()[:333] * units
    codes = prefix.blocks[:, 64:].reshape(-1, size // 4, 16, 4).transpose(0, 2, 1, 3).reshape(-1, size)[:333].astype(np.float64) - 128
    assert np.isnan(errors[:16]).all()  # the block of what has no bound
    well = np.arange(16, 333)
    assert np.isfinite(errors[well]).all()
    rows = items[:, 0].astype(np.float64)
    coded = codes[well] * scales[well, None]
    assert (norms[well] >= np.linalg.norm(coded, axis=1)).all()
    queries = decaying(rng, 40, width).astype(np.float64)
    turned = queries @ axes.T
    rest = np.linalg.norm(queries - turned @ axes, axis=1)
    bounds = turned @ coded.T + np.linalg.norm(turned, axis=1)[:, None] * errors[well] + rest[:, None] * rests[well]
    assert (bounds >= queries @ rows[well].T - 1e-12).all()


@pytest.mark.parametrize("instruction_set", _kernels.instruction_sets())
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_prefixes_change_nothing(instruction_set: str, half: bool, tokens: int, rng: np.random.Generator) -> None:
    items = decaying(rng, 5000, tokens, 96).astype(np.float16 if half else np.float32)
    items[17], items[18, 0], items[20:40] = 0, np.nan, items[50]
    queries = decaying(rng, 12, 96)
    queries[2] = 0
    codes = Screen.build(items, lists=False, prefix=False)
    anchor = np.arange(100, 112, dtype=np.int64)
    allowed = np.full(-(-5000 // 64), 0xFFFF0000FFFFFFFF, np.uint64)
    requests: tuple[dict[str, Any], ...] = (
        {},
        {"k": 300},
        {"k": 0, "zones": ZoneSpec(lo=0.01, hi=0.05), "picks": 5, "counts": True},
        {"zones": ZoneSpec(lo=0.01, hi=0.05, policy="softmax"), "anchor": anchor, "picks": 3, "counts": True},
        {"zones": ZoneSpec(lo=0.01, hi=0.05, bounds="rank"), "picks": 3, "counts": True},
        {"exclude": [[int(i), 20] for i in range(50, 62)]},
        {"allowed": allowed},
    )
    for covered in (5000, 3001):
        screen = Screen(codes.shards, prefix=built(items[:covered], 32))
        for options in requests:
            for batch in (1, 4):
                of_batch = {name: value[:batch] if name in ("anchor", "exclude") else value for name, value in options.items()}
                plain = cpu.select(request_of(queries[:batch], items, codes, **of_batch), instruction_set=instruction_set)
                found = cpu.select(request_of(queries[:batch], items, screen, **of_batch), instruction_set=instruction_set)
                assert same(plain, found), (covered, options, batch)


def of_axes(items: NDArray[np.float32], axes: NDArray[np.float32]) -> Prefix:
    blocks = np.empty((-(-len(items) // 16), 16 * len(axes) + 64), np.uint8)
    _kernels.fill_prefix([items], axes, blocks, 1)
    return Prefix(len(items), axes, blocks)


@pytest.mark.parametrize("instruction_set", _kernels.instruction_sets())
def test_on_the_bound_nothing_is_to_spare(instruction_set: str) -> None:
    """Where rests are parallel, so that Cauchy-Schwarz holds with equality: equal to the plain sweep.

    And not where one of the bound's numbers is a little too low.
    """

    def agree(inner: float, which: tuple[int, ...] = (), factor: float = 1.0) -> bool:
        width, own = 24, np.random.default_rng(5)
        basis = np.linalg.qr(own.standard_normal((width, width))).Q
        known = own.standard_normal((20_000, 16)) * inner
        items = (np.concatenate([known, own.uniform(0.2, 0.7, (20_000, 1)), np.zeros((20_000, 7))], axis=1) @ basis).astype(np.float32)
        asked = np.concatenate([own.standard_normal((4, 16)) * inner, np.full((4, 1), 0.6), np.zeros((4, 7))], axis=1)
        queries = (asked @ basis).astype(np.float32)
        codes = Screen.build(items, lists=False, prefix=False)
        prefix = of_axes(items[:, None], basis[:16].astype(np.float32))
        for number in which:
            prefix = with_numbers(prefix, number, factor)
        screen = Screen(codes.shards, prefix=prefix)
        results = []
        for query in queries[:, None]:
            for k in (1, 10, 200):
                plain = cpu.select(request_of(query, items, codes, k=k), instruction_set=instruction_set, threads=1)
                results.append(same(plain, cpu.select(request_of(query, items, screen, k=k), instruction_set=instruction_set, threads=1)))
        return all(results)

    for inner in (0.003, 0.1, 1.0):
        assert agree(inner)
    assert not agree(0.003, (3,), 0.99)  # lengths of the rests
    assert not agree(1.0, (1, 2), -1.0)  # what the codes leave
    assert not agree(1.0, (0,), 0.9)  # scales


@settings(max_examples=random_cases(80, 10_000), deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**40),
    size=st.sampled_from((1, 19, 111, 1600, 2500)),
    tokens=st.sampled_from((1, 3, 32)),
    width=st.integers(16, 300) | st.just(768),
    prefix_width=st.sampled_from((16, 32, 48, 128)),
    batch=st.integers(1, 4),
    k=st.sampled_from((0, 1, 10, 3000)),
    covered=st.floats(0, 1),
    special=st.sampled_from(("", "nan", "zeros", "copies", "equal", "lengths")),
    power=st.sampled_from((0.0, 1.0, 2.0)),
    instruction_set=st.sampled_from(_kernels.instruction_sets()),
    half=st.booleans(),
    zones=st.none()
    | st.builds(ZoneSpec, lo=st.just(0.01), hi=st.sampled_from((0.02, 0.3)), policy=st.sampled_from(("hardest", "softmax"))),
)
def test_random_galleries(
    seed: int,
    size: int,
    tokens: int,
    width: int,
    prefix_width: int,
    batch: int,
    k: int,
    covered: float,
    special: str,
    power: float,
    instruction_set: str,
    half: bool,
    zones: ZoneSpec | None,
) -> None:
    rng = np.random.default_rng(seed)
    size = max(1, min(size, 300_000 // (tokens * width)))
    prefix_width = min(prefix_width, width // 16 * 16)
    items = decaying(rng, size, tokens, width, power=power)
    some = rng.integers(size, size=1 + size // 5)
    match special:
        case "nan":
            items[some, rng.integers(tokens)] = rng.choice([np.nan, np.inf, -np.inf, 1e30])
        case "zeros":
            items[some] = 0
        case "copies":
            items[some] = items[0]
        case "equal":
            items[:] = items[0]
        case "lengths":
            items *= np.exp(rng.normal(0, 2, (size, tokens, 1))).astype(np.float32)
    with np.errstate(over="ignore"):
        items = items.astype(np.float16 if half else np.float32)
    queries = decaying(rng, batch, width, power=power)
    codes = Screen.build(items, lists=False, prefix=False)
    first = items[: round(covered * size)]
    screen = Screen(codes.shards, prefix=Prefix.build((first,), threads=1, least=1, width=prefix_width) if len(first) else None)
    options = {"k": k, "zones": zones, "picks": 3 if zones else 0, "counts": zones is not None}
    plain = cpu.select(request_of(queries, items, None, **options), instruction_set=instruction_set)
    assert same(plain, cpu.select(request_of(queries, items, screen, **options), instruction_set=instruction_set))


def test_a_prefix_is_kept_where_it_pays(rng: np.random.Generator) -> None:
    screen = Screen.build(decaying(rng, 70_000, 128, power=1.5), lists=False)
    assert screen.prefix is not None
    assert screen.prefix.width in (16, 32)
    chosen = min(screen.prefix.costs, key=lambda found: found.cost)
    assert chosen.width == screen.prefix.width
    assert f"first {chosen.width} of 128 rotated numbers" in screen.describe()
    assert screen.nbytes > Screen.build(np.ones((70_000, 128), np.float32), lists=False, prefix=False).nbytes
    isotropic = rng.standard_normal((70_000, 128)).astype(np.float32)
    plain = Screen.build(isotropic, lists=False)
    assert plain.prefix is None
    assert plain.no_prefix is not None
    assert [cost.width for cost in plain.no_prefix.costs] == [16, 32, 48, 64, 96, 128]
    assert "no prefix: none is expected to save 15% of a search (cost beside the plain sweep by width: 16: " in plain.describe()
    assert "no prefix: 70 tokens, and it is made for 65,536 to" in Screen.build(isotropic[:70]).describe()
    assert Screen.build(isotropic, lists=False, prefix=False).describe().startswith("8-bit codes of 70,000 tokens; no prefix; ")


@pytest.mark.parametrize(("power", "kept"), [(0.9, False), (1.2, True)])
def test_a_prefix_that_saves_less_than_a_tenth_is_not_kept(power: float, kept: bool, rng: np.random.Generator) -> None:
    """Measured with 150,000 of 256 numbers of such a spectrum: a search took 1.05, 0.91 and, with 1.0, 0.82 of its time without."""
    items = rng.standard_normal((66_000, 1, 256), np.float32) * np.arange(1, 257, dtype=np.float32) ** (-power / 2)
    items /= np.linalg.norm(items, axis=2, keepdims=True)
    assert (Prefix.build((items,), threads=1) is not None) == kept


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_queries_are_enough(count: int, rng: np.random.Generator) -> None:
    items = (decaying(rng, 3000, 1, 128, power=2.0),)
    by_queries, plain = (Prefix.weighed(items, queries=some, threads=1, least=1) for some in (decaying(rng, count, 128, power=2.0), None))
    assert len(by_queries.costs) == 6
    assert all(0 < found.cost < np.inf for found in by_queries.costs)
    assert (by_queries.costs == plain.costs) == (count == 0)


def test_queries_whose_products_overflow_keep_nothing(rng: np.random.Generator) -> None:
    huge = np.full((2, 128), 3e38, np.float32)  # finite, and no product with it is
    with np.errstate(all="ignore"):
        found = Prefix.weighed((decaying(rng, 3000, 1, 128, power=2.0),), queries=huge, threads=1, least=1)
    assert isinstance(found, NoPrefix)
    assert all(cost.left == 1 for cost in found.costs)


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (np.ones((4, 8), np.float64), "queries: dtype float64"),
        (np.ones(8, np.float32), "queries: shape"),
        (np.ones((4, 9), np.float32), "queries have D=9 and items D=8"),
        (np.array([[1.0] * 8, [np.nan] * 8], np.float32), "queries: row 1 holds NaN or infinity"),
        ([[1.0] * 8], "queries: expected a NumPy array, got list"),
    ],
)
def test_queries_are_checked(queries: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Screen.build(np.ones((20, 8), np.float32), queries)


def test_queries_decide_what_is_kept(rng: np.random.Generator) -> None:
    """Items that differ in few directions alone, and queries that ask for others."""
    items = decaying(rng, 70_000, 128, power=2.0)
    like_items = Prefix.build((items[:, None],), queries=decaying(rng, 200, 128, power=2.0), threads=2)
    others = Prefix.build((items[:, None],), queries=rng.standard_normal((200, 128)).astype(np.float32), threads=2)
    assert like_items is not None
    assert others is None or (others.width > like_items.width and others.cost > 2 * like_items.cost)


def test_few_or_short_tokens_have_no_prefix(rng: np.random.Generator) -> None:
    assert Screen.build(decaying(rng, 1000, 128, power=2.0)).prefix is None
    assert Prefix.build((np.ones((70_000, 1, 15), np.float32),), threads=1) is None
    assert Prefix.build((np.full((70_000, 1, 16), np.nan, np.float32),), threads=1) is None


def test_axes_must_be_orthonormal(rng: np.random.Generator) -> None:
    items, blocks = decaying(rng, 32, 1, 64), np.empty((2, 16 * 16 + 64), np.uint8)
    axes = np.eye(16, 64, dtype=np.float32)
    _kernels.fill_prefix([items], axes, blocks, 1)
    axes[3, 4] = 1e-3
    with pytest.raises(ValueError, match="orthonormal"):
        _kernels.fill_prefix([items], axes, blocks, 1)


@pytest.mark.parametrize("width", [8, 15, 80])
def test_the_width_of_prefixes_is_checked(width: int, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        _kernels.fill_prefix([decaying(rng, 32, 1, 64)], np.eye(width, 64, dtype=np.float32), np.empty((2, 16 * width + 64), np.uint8), 1)


def test_kernels_take_no_prefix_that_does_not_fit(rng: np.random.Generator) -> None:
    items, queries = decaying(rng, 500, 1, 64), decaying(rng, 1, 64)
    codes, prefix = Screen.build(items, lists=False), built(items, 16)
    wrong: tuple[tuple[Prefix, type[Exception]], ...] = (
        (dataclasses.replace(prefix, blocks=prefix.blocks[:-1]), ValueError),
        (dataclasses.replace(prefix, blocks=prefix.blocks[:, :-1]), TypeError),
        (dataclasses.replace(prefix, axes=prefix.axes[:, :-1].copy()), ValueError),
        (dataclasses.replace(prefix, axes=prefix.axes.astype(np.float64)), TypeError),  # type: ignore[arg-type]
    )
    for some, error in wrong:
        with pytest.raises(error):
            cpu.select(request_of(queries, items, Screen(codes.shards, prefix=some)))
    longer = dataclasses.replace(prefix, covered=501)  # of rows that have been removed since: not used
    plain = cpu.select(request_of(queries, items, codes))
    assert same(plain, cpu.select(request_of(queries, items, Screen(codes.shards, prefix=longer))))
