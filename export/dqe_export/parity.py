"""What an export is held to: each graph against PyTorch at shapes that it was not traced with, and the whole bundle in its answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqe_engine.compose import compose_query
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import COMPOSED_QUERY, GraphParity, OutputParity, Precision, RetrievalParity, Tolerance
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import ParityError
from dqe_engine.sessions import OnnxSession
from dqe_training.checkpoint import Checkpoint
from dqe_training.evaluation.protocol import EvaluationSet
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.runtime import evaluate_engine, index_gallery
from dqe_training.model import DQEModel

from .graphs import graph_module, random_inputs

TOLERANCES: Mapping[Precision, Tolerance] = {
    "float32": Tolerance(max_error=1e-4, min_cosine=0.999999, recall_points=0.1, min_overlap=0.995),
    "float16": Tolerance(max_error=0.02, min_cosine=0.9995, recall_points=0.2, min_overlap=0.97),
    **dict.fromkeys(("int8", "int8-static"), Tolerance(max_error=0.2, min_cosine=0.98, recall_points=1.0, min_overlap=0.8)),
}
SHAPES: tuple[dict[str, int], ...] = (
    {"batch": 1, "text_length": 1},
    {"batch": 1, "text_length": 2},
    {"batch": 2, "text_length": 5},
    {"batch": 7, "text_length": 17},
    {"batch": 33, "text_length": 32},
)
_RESAMPLES = 2000


class MakeInputs(Protocol):
    """Inputs of one graph in one shape."""

    def __call__(self, *, batch: int, text_length: int, seed: int) -> Mapping[str, Tensor]: ...


def _random_inputs(spec: GraphSpec, model: DQEModel) -> MakeInputs:
    return partial(random_inputs, spec, model.sizes, model.embeddings.word_embeddings.num_embeddings)


@torch.inference_mode()
def check_parity(
    spec: GraphSpec, model: DQEModel, path: Path, *, precision: Precision = "float32", inputs: MakeInputs | None = None
) -> GraphParity:
    """Run `path` and PyTorch (float32) on the same inputs, random ones unless `inputs` makes others.

    Raises ParityError where an output is off by more than allowed.
    """
    tolerance = TOLERANCES[precision]
    session = OnnxSession(path, spec, model.sizes, provider="cpu")
    module, make, shapes = graph_module(spec, model), inputs or _random_inputs(spec, model), _shapes(model)
    measured: dict[str, list[_Difference]] = {t.name: [] for t in spec.outputs}
    for seed, shape in enumerate(shapes, start=1):
        given = make(seed=seed, **shape)
        expected = module(**given)
        found = session.run(**{name: value.numpy() for name, value in given.items()})
        for tensor, reference in zip(spec.outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
            difference = _Difference(found[tensor.name], reference.numpy())
            difference.check(f"{spec.name}: {tensor.name}", tolerance, f"at {shape}")
            measured[tensor.name].append(difference)
    outputs = {name: _summary(differences) for name, differences in measured.items()}
    return GraphParity(graph=spec.name, outputs=outputs, shapes=shapes)


@torch.inference_mode()
def check_composition(
    model: DQEModel, directory: Path, *, precision: Precision = "float32", inputs: MakeInputs | None = None
) -> GraphParity:
    """The composed query through the graphs in `directory` one after the other, whose errors add up, as `check_parity` does for one."""
    tolerance, sizes = TOLERANCES[precision], model.sizes
    query, heads = (OnnxSession(directory / spec.file, spec, sizes, provider="cpu") for spec in (QUERY_ENCODER, ATTRIBUTE_HEADS))
    make, shapes, differences = inputs or _random_inputs(QUERY_ENCODER, model), _shapes(model), []
    for seed, shape in enumerate(shapes, start=1):
        given = make(seed=seed, **shape)
        arrays = {name: value.numpy() for name, value in given.items()}
        fused = query.run(**arrays)
        base = fused.pop("base_query")
        read = heads.run(**fused, attention_mask=arrays["attention_mask"])
        found = compose_query(base, read["sub_queries"], read["attribute_weights"])
        difference = _Difference(found, model.encode_query(**given).query.numpy())
        difference.check("the composed query", tolerance, f"at {shape}")
        differences.append(difference)
    return GraphParity(graph=COMPOSED_QUERY, outputs={"query": _summary(differences)}, shapes=shapes)


def _shapes(model: DQEModel) -> tuple[dict[str, int], ...]:
    return tuple({**s, "text_length": min(s["text_length"], model.config.qformer.max_text_length)} for s in SHAPES)


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


def _summary(differences: list[_Difference]) -> OutputParity:
    errors = np.concatenate([d.errors.ravel() for d in differences])
    cosines = np.concatenate([d.cosines for d in differences])
    return OutputParity(
        max_error=float(errors.max()), mean_error=float(errors.mean()), cosine_min=float(cosines.min()),
        cosine_p1=float(np.quantile(cosines, 0.01)), cosine_mean=float(cosines.mean()),
    )  # fmt: skip


def check_retrieval(
    checkpoint: Checkpoint, bundle: Path, evaluation: EvaluationSet, images: Path, *, data: str, precision: Precision
) -> RetrievalParity:
    """Answer every query of `evaluation` in PyTorch (float32) and through the runtime, preprocessing and text included.

    Raises ParityError where recall@10 or the overlap of the first ten falls by more than the precision allows; one query may always
    change its mind.
    """
    model = checkpoint.model
    _, ours = evaluate_model(model, checkpoint.tokenizer, evaluation, encode_gallery_images(model, images, evaluation))
    engine = RetrievalEngine.load(bundle, provider="cpu", verify=False)
    index_gallery(engine, images, evaluation)
    _, theirs = evaluate_engine(engine, evaluation)
    hits = [(found.ranked[:, :10] == evaluation.target[:, None]).any(axis=1) for found in (ours, theirs)]
    change = 100 * (hits[1].astype(np.float64) - hits[0])
    rows = np.random.default_rng(0).integers(len(change), size=(_RESAMPLES, len(change)))
    low, high = np.quantile(change[rows].mean(axis=1), [0.025, 0.975])
    overlap = np.mean([np.isin(a[a >= 0], b).mean() for a, b in zip(ours.ranked[:, :10], theirs.ranked[:, :10], strict=True)])
    tolerance = TOLERANCES[precision]
    allowed = max(tolerance.recall_points, 100 / len(change))
    if not change.mean() >= -allowed:
        raise ParityError(
            f"recall@10 on {data} is {100 * hits[1].mean():.1f} % with the bundle, {100 * hits[0].mean():.1f} % in PyTorch: "
            f"more than {allowed:.1f} points lower; nothing was written"
        )
    if not overlap >= tolerance.min_overlap:
        raise ParityError(
            f"of PyTorch's first ten answers on {data}, the bundle's first ten hold {100 * overlap:.1f} %, "
            f"less than {100 * tolerance.min_overlap:.1f} %; nothing was written"
        )
    return RetrievalParity(
        data=data, queries=len(change), gallery=len(evaluation.gallery), pytorch_recall_at_10=float(hits[0].mean()),
        bundle_recall_at_10=float(hits[1].mean()), difference=float(change.mean()), interval=(float(low), float(high)),
        top10_overlap=float(overlap), allowed=allowed,
    )  # fmt: skip
