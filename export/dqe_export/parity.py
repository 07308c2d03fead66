"""What a graph is held to: PyTorch at shapes that it was not traced with, every word and position, unit norms, and itself in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dqe_engine.compose import compose_query
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import COMPOSED_QUERY, GraphParity, OutputParity, Precision, Tolerance
from dqe_engine.errors import ParityError
from dqe_engine.sessions import OnnxSession
from dqe_training.model import DQEModel

from .batch_dependence import MakeInputs, check_batch_dependence
from .graphs import graph_module, random_inputs
from .word_table import looked_up

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
SHAPES: tuple[dict[str, int], ...] = (
    {"batch": 1, "text_length": 1},
    {"batch": 1, "text_length": 2},
    {"batch": 2, "text_length": 5},
    {"batch": 7, "text_length": 17},
    {"batch": 33, "text_length": 32},
)
_LONGEST_TEXTS = 1024
"""Tokens of the longest texts that a graph is tried with, all together: no more, so that a published BLIP-2 takes seconds."""
_SOURCE_IMAGES = 7
"""The largest batch of images that a graph is tried with before it is rounded: a large tower takes seconds for each."""
UNIT_NORM = frozenset({"base_query", "sub_queries", "target_tokens", "query"})
NEVER_NEGATIVE = frozenset({"attribute_weights"})


@dataclass(frozen=True)
class Case:
    """Inputs of one shape, and PyTorch's outputs."""

    shape: dict[str, int]
    inputs: Mapping[str, NDArray[Any]]
    expected: Mapping[str, NDArray[np.float32]]


class Reference:
    """PyTorch's outputs (float32) of one graph at every shape: each computed once, however many graphs are held against it.

    `inputs`: what makes the inputs; random ones without.
    """

    def __init__(self, spec: GraphSpec, model: DQEModel, inputs: MakeInputs | None = None) -> None:
        self.spec, self.model = spec, model
        self._cases: dict[int, Case] = {}
        self.make: MakeInputs = inputs or partial(random_inputs, spec, model.sizes, model.embeddings.word_embeddings.num_embeddings)

    @property
    def longest(self) -> int:
        return self.model.config.qformer.max_text_length

    def cases(self, most: int | None = None) -> Iterator[Case]:
        """One for each shape whose batch is of `most` at most."""
        module = graph_module(self.spec, self.model)
        for seed, shape in enumerate(shapes_of(self.spec, self.model), start=1):
            if most is not None and shape["batch"] > most:
                continue
            if seed not in self._cases:
                self._cases[seed] = self._case(seed, shape, lambda **given: _named(self.spec, module(**given)))
            yield self._cases[seed]

    def of(self, evaluate: Callable[..., Mapping[str, torch.Tensor]]) -> Iterator[Case]:
        """The outputs of `evaluate` instead, on the same inputs."""
        for seed, shape in enumerate(shapes_of(self.spec, self.model), start=1):
            yield self._case(seed, shape, evaluate)

    @torch.inference_mode()
    def _case(self, seed: int, shape: dict[str, int], evaluate: Callable[..., Mapping[str, torch.Tensor]]) -> Case:
        given = self.make(seed=seed, batch=shape["batch"], text_length=shape.get("text_length", 0))
        expected = {name: value.numpy() for name, value in evaluate(**given).items()}
        return Case(shape, {name: value.numpy() for name, value in given.items()}, expected)


def _named(spec: GraphSpec, outputs: Any) -> dict[str, torch.Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: value for tensor, value in zip(spec.outputs, outputs, strict=True)}


def shapes_of(spec: GraphSpec, model: DQEModel) -> tuple[dict[str, int], ...]:
    """Shapes to try a graph at, none of them traced. Texts get as long as the model takes them: each position then has been tried, and
    of a small vocabulary each word."""
    longest, words = model.config.qformer.max_text_length, model.embeddings.word_embeddings.num_embeddings
    if not any("text_length" in tensor.axes for tensor in spec.inputs):
        return tuple({"batch": batch} for batch in sorted({shape["batch"] for shape in SHAPES}))
    rows = min(-(-words // longest), max(2, _LONGEST_TEXTS // longest))
    shapes = (*SHAPES, {"batch": rows, "text_length": longest})
    return tuple({**shape, "text_length": min(shape["text_length"], longest)} for shape in shapes)


def check_parity(
    spec: GraphSpec,
    model: DQEModel,
    path: Path,
    *,
    precision: Precision = "float32",
    reference: Reference | None = None,
) -> GraphParity:
    """Run `path` and PyTorch (float32) on the same inputs; then `path` alone and in batches.

    `reference`: of this spec and model; it keeps what PyTorch computes for the next graph, and says which inputs. Random ones without.
    Raises ParityError where an output is off by more than allowed.
    """
    return _check(reference or Reference(spec, model), path, TOLERANCES[precision])


def check_source(reference: Reference, path: Path) -> None:
    """Hold the float32 graph that a lower precision is made from to PyTorch, as strictly as a float32 bundle's: what an export gets
    wrong by less than rounding does would not be seen any more in the rounded graph. Raises ParityError."""
    _check(reference, path, TOLERANCES["float32"], most=_SOURCE_IMAGES if reference.spec == VISION_ENCODER else None)


def _check(reference: Reference, path: Path, tolerance: Tolerance, *, most: int | None = None) -> GraphParity:
    spec, model = reference.spec, reference.model
    session = OnnxSession(path, spec, model.sizes, provider="cpu")
    if spec == QUERY_ENCODER:
        for found, expected in looked_up(model, path):
            _Difference(found, expected).check(f"{spec.name}: word_embeddings", tolerance, "somewhere in the vocabulary")

    def run(given: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return session.run(**given)

    outputs = _hold(f"{spec.name}: ", run, reference.cases(most), tolerance)
    dependence = check_batch_dependence(spec, run, reference.make, longest=reference.longest, bound=tolerance.batch_dependence)
    return GraphParity(graph=spec.name, outputs=outputs, shapes=shapes_of(spec, model), batch_dependence=dependence)


def check_composition(
    model: DQEModel, directory: Path, *, precision: Precision = "float32", inputs: MakeInputs | None = None
) -> GraphParity:
    """The composed query through the graphs in `directory` one after the other, whose errors add up, as `check_parity` does for one."""
    tolerance, sizes = TOLERANCES[precision], model.sizes
    query, heads = (OnnxSession(directory / spec.file, spec, sizes, provider="cpu") for spec in (QUERY_ENCODER, ATTRIBUTE_HEADS))
    reference = Reference(QUERY_ENCODER, model, inputs)

    def run(given: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        fused = query.run(**given)
        base = fused.pop("base_query")
        read = heads.run(**fused, attention_mask=given["attention_mask"])
        return {"query": compose_query(base, read["sub_queries"], read["attribute_weights"])}

    cases = reference.of(lambda **given: {"query": model.encode_query(**given).query})
    outputs = _hold("the composed ", run, cases, tolerance)
    dependence = check_batch_dependence(
        QUERY_ENCODER, run, reference.make, longest=reference.longest, bound=tolerance.batch_dependence, name="query encoder and heads"
    )
    return GraphParity(graph=COMPOSED_QUERY, outputs=outputs, shapes=shapes_of(QUERY_ENCODER, model), batch_dependence=dependence)


def _hold(
    name: str, run: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]], cases: Iterable[Case], tolerance: Tolerance
) -> dict[str, OutputParity]:
    measured: dict[str, list[_Difference]] = {}
    for case in cases:
        found = run(case.inputs)
        for output, expected in case.expected.items():
            where = f"at {case.shape}"
            difference = _Difference(found[output], expected)
            difference.check(name + output, tolerance, where)
            _check_range(name, output, found[output], expected, tolerance, where)
            measured.setdefault(output, []).append(difference)
    outputs = {output: _summary(differences) for output, differences in measured.items()}
    for output, summary in outputs.items():
        if _beyond(summary.mean_error, tolerance.mean_error):
            raise ParityError(
                f"{name}{output} differs from PyTorch by {summary.mean_error:.2e} in the mean of all elements and shapes, "
                f"more than {tolerance.mean_error:.0e}; nothing was written"
            )
    return outputs


def _check_range(
    name: str, output: str, found: NDArray[np.float32], expected: NDArray[np.float32], tolerance: Tolerance, where: str
) -> None:
    """What an output promises by its meaning. A rounded vector of unit norm may point elsewhere, but scores and zones count on its
    length. Where PyTorch's is zero (a model without attribute heads), so must this be."""
    if output in UNIT_NORM:
        lengths, wanted = (np.linalg.norm(values.astype(np.float64), axis=-1) for values in (found, expected))
        worst = float(np.abs(lengths - wanted).max(initial=0))
        if _beyond(worst, tolerance.norm):
            raise ParityError(
                f"{name}{output} differs from PyTorch in length by {worst:.2e} {where}, more than {tolerance.norm:.0e}: "
                "it should be of unit norm; nothing was written"
            )
    if output in NEVER_NEGATIVE and not found.min(initial=0) >= 0:
        raise ParityError(f"{name}{output} has {found.min():.2e} {where}, and is never negative in PyTorch; nothing was written")


def _beyond(value: float, bound: float | None) -> bool:
    """NaN is."""
    return bound is not None and not value <= bound


class _Difference:
    """Element errors, relative to the largest reference value where that exceeds 1, and cosines of vectors: those of the last axis."""

    def __init__(self, found: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        a, b = (array.astype(np.float64).reshape(-1, array.shape[-1]) for array in (found, reference))
        self.errors = np.abs(a - b) / max(1.0, float(np.abs(b).max(initial=0)))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = (a == b).all(axis=1)  # also two zero vectors, which have no cosine
        self.cosines = np.where(same, 1.0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, np.inf))

    def check(self, what: str, tolerance: Tolerance, where: str) -> None:
        """Raises ParityError; NaN fails."""
        if not self.errors.max() <= tolerance.max_error:
            raise ParityError(
                f"{what} differs from PyTorch by {self.errors.max():.2e} {where}, more than {tolerance.max_error:.0e}; nothing was written"
            )
        if not self.cosines.min() >= tolerance.min_cosine:
            raise ParityError(
                f"{what} differs from PyTorch: cosine {self.cosines.min():.5f} {where}, less than {tolerance.min_cosine}; "
                "nothing was written"
            )


def _summary(differences: Sequence[_Difference]) -> OutputParity:
    errors = np.concatenate([d.errors.ravel() for d in differences])
    cosines = np.concatenate([d.cosines for d in differences])
    return OutputParity(
        max_error=float(errors.max()), mean_error=float(errors.mean()), cosine_min=float(cosines.min()),
        cosine_p1=float(np.quantile(cosines, 0.01)), cosine_mean=float(cosines.mean()),
    )  # fmt: skip
