from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.samples import noise_image

from dqe_engine.bundle import Bundle
from dqe_engine.compose import apply_overrides, compose_query
from dqe_engine.contracts.graphs import GraphSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.query import Query
from dqe_engine.sessions import GraphSession, OnnxSession

NAMES = ("colour", "shape")


def arrays(batch: int, heads: int = 2, dim: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(batch)
    base, subs = rng.standard_normal((batch, dim)), rng.standard_normal((batch, heads, dim))
    return base.astype(np.float32), subs.astype(np.float32), rng.random((batch, heads)).astype(np.float32)


@pytest.mark.parametrize("batch", [0, 1, 19])
def test_the_equation(batch: int) -> None:
    base, subs, weights = arrays(batch)
    query = compose_query(base, subs, weights)
    assert query.shape == (batch, 5)
    assert query.dtype == np.float32
    for b in range(batch):
        total = base[b].astype(np.float64)
        for a in range(2):
            total = total + float(weights[b, a]) * subs[b, a]
        np.testing.assert_allclose(query[b], total / np.linalg.norm(total), rtol=0, atol=1e-7)


def test_no_attributes_and_zero_vectors() -> None:
    base = np.array([[3, 4], [0, 0]], np.float32)
    got = compose_query(base, np.empty((2, 0, 2), np.float32), np.empty((2, 0), np.float32))
    np.testing.assert_array_equal(got, np.array([[0.6, 0.8], [0, 0]], np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    base, subs, weights = arrays(2)
    subs[1, 0, 0] = value
    query = compose_query(base, subs, weights)
    assert np.isfinite(query[0]).all()
    assert np.isnan(query[1]).any()


def test_shapes_that_disagree() -> None:
    base, subs, weights = arrays(3)
    for wrong in ((base[:2], subs, weights), (base[0], subs, weights), (base, subs[:, :1], weights), (base[:, :4], subs, weights)):
        with pytest.raises(InputError, match="expected"):
            compose_query(*wrong)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_overrides_multiply_their_own_attribute_only(colour: float, shape: float) -> None:
    weights = np.array([[0.5, 0.25], [0, 1]], np.float32)
    kept = weights.copy()
    got = apply_overrides(weights, NAMES, {"shape": shape, "colour": colour})
    np.testing.assert_array_equal(got, (weights.astype(np.float64) * [colour, shape]).astype(np.float32))
    np.testing.assert_array_equal(weights, kept)


def test_no_overrides_change_nothing() -> None:
    weights = np.array([[0.5, 0.25]], np.float32)
    np.testing.assert_array_equal(apply_overrides(weights, NAMES, {}), weights)


@pytest.mark.parametrize("factor", [-1, -0.001, float("nan"), float("inf"), "2", None, True])
def test_multipliers_that_are_refused(factor: object) -> None:
    with pytest.raises(InputError, match="'colour': expected a finite multiplier"):
        apply_overrides(np.ones((1, 2), np.float32), NAMES, {"colour": factor})


def test_unknown_names_and_overflow() -> None:
    with pytest.raises(InputError, match="unknown attribute 'size'; this model has colour, shape"):
        apply_overrides(np.ones((1, 2), np.float32), NAMES, {"size": 1})
    with pytest.raises(InputError, match="beyond what float32"):
        apply_overrides(np.ones((1, 2), np.float32), NAMES, {"colour": 1e39})
    with pytest.raises(InputError, match="weights of shape"):
        apply_overrides(np.ones((1, 3), np.float32), NAMES, {})


def test_the_largest_weights_still_compose() -> None:
    base, subs, _ = arrays(1)
    query = compose_query(base, subs, np.full((1, 2), np.finfo(np.float32).max))
    np.testing.assert_allclose(np.linalg.norm(query), 1, rtol=1e-6, atol=0)


class Padded:
    """A session that wants texts of some lengths, and remembers which it got."""

    def __init__(self, session: OnnxSession, buckets: tuple[int, ...]) -> None:
        self.session, self.text_buckets, self.lengths = session, buckets, list[int]()
        self.spec, self.provider = session.spec, session.provider

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if "attention_mask" in inputs:
            self.lengths.append(inputs["attention_mask"].shape[1])
        return self.session.run(**inputs)


@pytest.mark.parametrize("padded", [("query_encoder", "attribute_heads"), ("query_encoder",), ("attribute_heads",)])
def test_queries_of_padded_texts_are_the_same(bundle_path: Path, padded: tuple[str, ...]) -> None:
    """Heads may run elsewhere than the query encoder: those of a bundle can be replaced, and have no engine then."""
    bundle, opened = Bundle.load(bundle_path), dict[str, Padded]()

    def open_graph(spec: GraphSpec) -> GraphSession:
        session = bundle.session(spec, provider="cpu", threads=1)
        if spec.name not in padded:
            return session
        opened[spec.name] = Padded(session, (8, 16))
        return opened[spec.name]

    plain, engine = RetrievalEngine.load(bundle_path, provider="cpu", threads=1), RetrievalEngine(bundle, open_graph)
    texts = ["in red", "the same but with long sleeves and more blue", "red"]
    for start, end, length in ((0, 1, 8), (0, 3, 16), (2, 3, 8)):
        queries = [Query(image=noise_image(n), text=texts[n]) for n in range(start, end)]
        found, expected = (e.encode_queries(queries) for e in (engine, plain))
        for name in ("queries", "predicted_weights", "weights"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)
        assert {session.lengths[-1] for session in opened.values()} == {length}
