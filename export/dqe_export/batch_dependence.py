"""Whether an answer depends on nothing but its question: one graph against itself, alone, in batches, and padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dqe_engine.contracts.graphs import GraphSpec, TensorSpec
from dqe_engine.errors import ParityError

Arrays = Mapping[str, NDArray[Any]]
_WORDS, _MOST_WORDS = 3, 128
"""Tokens of the text that is asked alone, and at most of those beside it."""


class MakeInputs(Protocol):
    """Inputs of one graph in one shape."""

    def __call__(self, *, batch: int, text_length: int, seed: int) -> Mapping[str, Tensor]: ...


def check_batch_dependence(
    spec: GraphSpec, run: Callable[[Arrays], Arrays], make: MakeInputs, *, longest: int, bound: float | None, name: str = ""
) -> float:
    """The largest difference between the answer to a question asked alone and to the same one in company: first and last in a batch of
    five, padded with other tokens behind the mask, and both. Relative to the answer's largest value where that exceeds 1.

    `run` takes the inputs of `spec`. `longest`: tokens that the model takes; the long texts here have 128 at most. Outputs at masked
    positions answer nothing, and are not compared.

    Raises ParityError above `bound`; NaN fails.
    """
    name = name or spec.name
    words, longest = min(_WORDS, longest), min(_MOST_WORDS, longest)
    alone = _arrays(make(batch=1, text_length=words, seed=101))
    text_axes = {t.name: t.axes.index("text_length") for t in spec.outputs if "text_length" in t.axes}
    expected, worst = run(alone), 0.0
    for how, given in _companies(spec, alone, make, words=words, longest=longest):
        for output, values in run(given).items():
            if output in text_axes:
                values = values.take(np.arange(words), axis=text_axes[output])
            largest = max(1.0, float(np.abs(expected[output]).max(initial=0)))
            for row in (values[:1], values[-1:]):  # the question is first and last
                difference = float(np.abs(row.astype(np.float64) - expected[output]).max(initial=0)) / largest
                if bound is not None and not difference <= bound:
                    raise ParityError(
                        f"{name}: {output} depends on more than its question: {how}, it differs from the answer to the same question asked "
                        f"alone by {difference:.2e}, more than {bound:.0e}; nothing was written"
                    )
                worst = max(worst, difference)
    return worst


def _companies(spec: GraphSpec, alone: Arrays, make: MakeInputs, *, words: int, longest: int) -> Iterator[tuple[str, Arrays]]:
    """Batches whose first and last rows ask what `alone` asks."""
    others = _arrays(make(batch=3, text_length=words, seed=102))
    yield "in a batch of five", _batch(alone, others)
    if any("text_length" in tensor.axes for tensor in spec.inputs) and longest > words:
        others = _arrays(make(batch=3, text_length=longest, seed=103))
        padded = {tensor.name: _padded(tensor, alone[tensor.name], others[tensor.name]) for tensor in spec.inputs}
        yield f"padded to {longest} tokens", padded
        yield f"beside texts of {longest} tokens", _batch(padded, others)


def _batch(question: Arrays, others: Arrays) -> Arrays:
    return {name: np.concatenate([value, others[name], value]) for name, value in question.items()}


def _padded(tensor: TensorSpec, value: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """`value` with the rest of `other`'s first row behind it, which the mask hides."""
    if "text_length" not in tensor.axes:
        return value
    rest = other[:1, value.shape[1] :]
    return np.concatenate([value, np.zeros_like(rest) if tensor.name == "attention_mask" else rest], axis=1)


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in tensors.items()}
