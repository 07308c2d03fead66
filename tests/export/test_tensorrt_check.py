"""The check of a new engine against ONNX Runtime: which sizes it runs, and which differences it lets through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.tiny_bundle import SIZES

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER, TARGET_ENCODER, GraphSpec
from dqe_engine.errors import ParityError
from dqe_export.differences import TOLERANCES
from dqe_export.tensorrt.check import check_engine
from dqe_export.tensorrt.plan import parse_profile


class _Changed:
    """A session whose outputs are `factor` times another's, and off by `offset` in one element."""

    provider, spec = "test", TARGET_ENCODER

    def __init__(self, bundle: Path, factor: float = 1, offset: float = 0) -> None:
        self.session, self.factor, self.offset = Bundle.load(bundle).session(TARGET_ENCODER, provider="cpu", threads=1), factor, offset

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = {name: (array * self.factor).astype(np.float32) for name, array in self.session.run(**inputs).items()}
        outputs["target_tokens"].flat[-1] += self.offset
        return outputs


@pytest.mark.parametrize("precision", TOLERANCES)
def test_each_precision_has_a_tolerance_that_bites(bundle: Path, precision: str) -> None:
    tolerance = msgspec.structs.replace(TOLERANCES[precision], norm=None)

    def check(factor: float, offset: float) -> float:
        parity = check_engine(
            TARGET_ENCODER, SIZES, _Changed(bundle, factor, offset), _Changed(bundle), [parse_profile("batch=1:2:3", 16)],
            captured=[{"batch": 5}], vocab_size=20, tolerance=tolerance,
        )  # fmt: skip
        assert parity.shapes == ({"batch": 1}, {"batch": 2}, {"batch": 3}, {"batch": 5})
        return parity.outputs["target_tokens"].max_error

    assert 0 < check(1, tolerance.max_error / 4) < tolerance.max_error
    for factor, offset in ((1, 2 * tolerance.max_error), (1 + 2 * tolerance.max_error, 0), (1, float("nan"))):
        with pytest.raises(ParityError, match="target_tokens differs from ONNX Runtime"):
            check(factor, offset)


@pytest.mark.parametrize("wrong", [lambda batch, _: batch == 7, lambda _, length: length == 15], ids=["batch 7", "15 tokens"])
def test_sizes_between_those_that_are_tuned_for(bundle: Path, wrong: Callable[[int, int], bool]) -> None:
    session = Bundle.load(bundle).session(QUERY_ENCODER, provider="cpu", threads=1)

    class Remainders:
        provider, spec = "test", QUERY_ENCODER

        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            return {name: array * (0 if wrong(*inputs["input_ids"].shape) else 1) for name, array in session.run(**inputs).items()}

    with pytest.raises(ParityError, match="differs from ONNX Runtime"):
        check_engine(
            QUERY_ENCODER, SIZES, Remainders(), session, [parse_profile("batch=2:8:32,text_length=2:8:16", 16)],
            vocab_size=20, tolerance=TOLERANCES["float16"],
        )  # fmt: skip


@pytest.mark.parametrize("spec", [QUERY_ENCODER, ATTRIBUTE_HEADS], ids=lambda s: s.name)
def test_a_profile_of_one_query_must_heed_the_mask(bundle: Path, spec: GraphSpec) -> None:
    """Its kernels are its own, and a service pads single texts: other batches show nothing of it."""
    session = Bundle.load(bundle).session(spec, provider="cpu", threads=1)

    class Deaf:
        provider, spec = "test", session.spec

        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            mask = inputs["attention_mask"]
            return session.run(**inputs | ({"attention_mask": np.ones_like(mask)} if len(mask) == 1 else {}))

    profiles = [parse_profile(f"batch={batch},text_length=2:4:16", 16) for batch in ("1:1:1", "2:3:4")]
    options = {"vocab_size": 20, "tolerance": TOLERANCES["float16"]}
    assert check_engine(spec, SIZES, session, session, profiles, **options).shapes  # type: ignore[arg-type]
    with pytest.raises(ParityError, match=r"differs from ONNX Runtime .*'batch': 1, .*, padded"):
        check_engine(spec, SIZES, Deaf(), session, profiles, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", TOLERANCES)
def test_an_engine_keeps_unit_norms(bundle: Path, precision: str) -> None:
    """Scores count on them, and the elements of a long vector are too small to show a common factor."""
    tolerance = TOLERANCES[precision]
    loose = msgspec.structs.replace(tolerance, max_error=0.2, mean_error=0.1)
    with pytest.raises(ParityError, match=r"target_tokens differs from ONNX Runtime in length by 5.*e-03 at"):
        check_engine(
            TARGET_ENCODER, SIZES, _Changed(bundle, 0.995), _Changed(bundle), [parse_profile("batch=1:2:3", 16)],
            vocab_size=20, tolerance=loose,
        )  # fmt: skip


def test_a_small_error_in_large_numbers_is_small(bundle: Path) -> None:
    """Relative to the largest, not element by element: next to zero is nothing to be relative to."""

    class Large(_Changed):
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            return {name: 1000 * array + self.offset for name, array in self.session.run(**inputs).items()}

    parity = check_engine(
        TARGET_ENCODER, SIZES, Large(bundle, offset=1e-4), Large(bundle), [parse_profile("batch=1:2:3", 16)],
        vocab_size=20, tolerance=msgspec.structs.replace(TOLERANCES["float32"], norm=None),
    )  # fmt: skip
    assert parity.outputs["target_tokens"].max_error < 1e-6
