"""What a graph is held to: PyTorch at shapes that it was not traced with, every word and position, unit norms, and itself in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
from dqe_engine.sessions import OnnxSession
from dqe_training.model import DQEModel

from .batch_dependence import MakeInputs, check_batch_dependence
from .differences import TOLERANCES, Difference, check_range, summary
from .graphs import graph_module, random_inputs
from .word_table import looked_up

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
            Difference(found, expected).check(f"{spec.name}: word_embeddings", "PyTorch", tolerance, "somewhere in the vocabulary")

    def run(given: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return session.run(**given)

    outputs = _hold(f"{spec.name}: ", run, reference.cases(most), tolerance)
    dependence = check_batch_dependence(spec, run, reference.make, longest=reference.longest, bound=tolerance.batch_dependence)
    return GraphParity(graph=spec.name, outputs=outputs, shapes=shapes_of(spec, model), batch_dependence=dependence)


def check_composition(
    model: DQEModel, directory: Path, *, precision: Precision = "float32", inputs: MakeInputs | None = None
) -> GraphParity:
    """The composed query through the graphs in `directory` one after the other, whose errors add up, as `check_parity` does for one.
    Without attribute heads it is the base query."""
    tolerance, sizes = TOLERANCES[precision], model.sizes
    query = OnnxSession(directory / QUERY_ENCODER.file, QUERY_ENCODER, sizes, provider="cpu")
    heads = OnnxSession(directory / ATTRIBUTE_HEADS.file, ATTRIBUTE_HEADS, sizes, provider="cpu") if sizes.attributes else None
    reference = Reference(QUERY_ENCODER, model, inputs)

    def run(given: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        fused = query.run(**given)
        base = fused.pop("base_query")
        if heads is None:
            return {"query": base}
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
    measured: dict[str, list[Difference]] = {}
    for case in cases:
        found = run(case.inputs)
        for output, expected in case.expected.items():
            where = f"at {case.shape}"
            difference = Difference(found[output], expected)
            difference.check(name + output, "PyTorch", tolerance, where)
            check_range(name, output, found[output], expected, "PyTorch", tolerance, where)
            measured.setdefault(output, []).append(difference)
    return {output: summary(name + output, "PyTorch", differences, tolerance) for output, differences in measured.items()}
