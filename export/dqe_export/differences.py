"""How far outputs are from a reference's, in the terms of `Tolerance`. NumPy alone: TensorRT's engines are held by it without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.manifest import OutputParity, Precision, Tolerance
from dqe_engine.errors import ParityError

TOLERANCES: Mapping[Precision, Tolerance] = {
    "float32": Tolerance(
        max_error=2e-5, mean_error=2e-6, min_cosine=0.999999, norm=1e-5, batch_dependence=1e-5, recall_points=0.1, min_overlap=0.995
    ),
    "float16": Tolerance(
        max_error=0.005, mean_error=0.001, min_cosine=0.99996, norm=0.001, batch_dependence=0.001, recall_points=0.2, min_overlap=0.97
    ),
    **dict.fromkeys(
        ("int8", "int8-static"),
        Tolerance(max_error=0.2, mean_error=0.02, min_cosine=0.98, norm=1e-5, batch_dependence=1e-6, recall_points=1.0, min_overlap=0.8),
    ),
}
"""Some four times what is measured on the demo's model and on those of the tests, or a little more. float16's `norm` and
`batch_dependence` are two of its steps at 1: an output that is rounded to it may be one off."""

UNIT_NORM = frozenset({"base_query", "sub_queries", "target_tokens", "query"})
NEVER_NEGATIVE = frozenset({"attribute_weights"})


class Difference:
    """Element errors, relative to the largest reference value where that exceeds 1, and cosines of vectors: those of the last axis."""

    def __init__(self, found: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        a, b = (array.astype(np.float64).reshape(-1, array.shape[-1]) for array in (found, reference))
        self.errors = np.abs(a - b) / max(1.0, float(np.abs(b).max(initial=0)))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = (a == b).all(axis=1)  # also two zero vectors, which have no cosine
        self.cosines = np.where(same, 1.0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, np.inf))

    def check(self, what: str, reference: str, tolerance: Tolerance, where: str) -> None:
        """Raises ParityError, one line, where an element or a vector is off by more than allowed; NaN is."""
        if not self.errors.max() <= tolerance.max_error:
            raise ParityError(f"{what} differs from {reference} by {self.errors.max():.2e} {where}, more than {tolerance.max_error:.0e}; "
                              "nothing was written")  # fmt: skip
        if not self.cosines.min() >= tolerance.min_cosine:
            raise ParityError(
                f"{what} differs from {reference}: cosine {self.cosines.min():.5f} {where}, less than {tolerance.min_cosine}; "
                "nothing was written"
            )


def summary(what: str, reference: str, differences: Sequence[Difference], tolerance: Tolerance) -> OutputParity:
    """Over all shapes. Raises ParityError where the mean error is more than allowed; NaN is."""
    errors = np.concatenate([d.errors.ravel() for d in differences])
    cosines = np.concatenate([d.cosines for d in differences])
    found = OutputParity(
        max_error=float(errors.max()), mean_error=float(errors.mean()), cosine_min=float(cosines.min()),
        cosine_p1=float(np.quantile(cosines, 0.01)), cosine_mean=float(cosines.mean()),
    )  # fmt: skip
    if beyond(found.mean_error, tolerance.mean_error):
        raise ParityError(
            f"{what} differs from {reference} by {found.mean_error:.2e} in the mean of all elements and shapes, "
            f"more than {tolerance.mean_error:.0e}; nothing was written"
        )
    return found


def beyond(value: float, bound: float | None) -> bool:
    """Whether `value` is more than `bound`, None for no bound. NaN is."""
    return bound is not None and not value <= bound


def check_range(
    name: str,
    output: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    reference: str,
    tolerance: Tolerance,
    where: str,
) -> None:
    """What an output promises by its meaning. A rounded vector of unit norm may point elsewhere, but scores and zones count on its
    length. Where the reference's is zero (a model without attribute heads), so must this be."""
    if output in UNIT_NORM:
        lengths, wanted = (np.linalg.norm(values.astype(np.float64), axis=-1) for values in (found, expected))
        worst = float(np.abs(lengths - wanted).max(initial=0))
        if beyond(worst, tolerance.norm):
            raise ParityError(
                f"{name}{output} differs from {reference} in length by {worst:.2e} {where}, more than {tolerance.norm:.0e}: "
                "it should be of unit norm; nothing was written"
            )
    if output in NEVER_NEGATIVE and not found.min(initial=0) >= 0:
        raise ParityError(f"{name}{output} has {found.min():.2e} {where}, and is never negative in {reference}; nothing was written")
