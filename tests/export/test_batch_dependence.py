"""An answer depends on nothing but its question: graphs where it does are refused, also where each answer is close enough to PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from support.graph_edits import GraphEdit, with_batch_mean

from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.errors import ParityError
from dqe_engine.sessions import OnnxSession
from dqe_export.batch_dependence import check_batch_dependence
from dqe_export.graphs import random_inputs
from dqe_training.checkpointing.checkpoint import Checkpoint, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 40


@pytest.fixture(scope="module")
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    return load_checkpoint(checkpoint_path)


def dependence(checkpoint: Checkpoint, spec: GraphSpec, path: Path, bound: float) -> float:
    model = checkpoint.model
    session = OnnxSession(path, spec, model.sizes, provider="cpu", threads=1)
    make = partial(random_inputs, spec, model.sizes, model.embeddings.word_embeddings.num_embeddings)
    return check_batch_dependence(spec, lambda given: session.run(**given), make, longest=LONGEST, bound=bound)


@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
def test_honest_graphs_do_not_mind(spec: GraphSpec, checkpoint: Checkpoint, bundle_path: Path) -> None:
    assert dependence(checkpoint, spec, bundle_path / spec.file, 1e-6) <= 1e-6


@pytest.mark.parametrize(
    ("spec", "edit"),
    [
        (VISION_ENCODER, with_batch_mean("image_tokens", 1e-4)),
        (QUERY_ENCODER, with_batch_mean("base_query", 1e-4)),
        (QUERY_ENCODER, with_batch_mean("fused_text", 1e-4)),
        (ATTRIBUTE_HEADS, with_batch_mean("attribute_weights", 1e-3)),
        (TARGET_ENCODER, with_batch_mean("target_tokens", 1e-4)),
    ],
    ids=lambda value: value.name if isinstance(value, GraphSpec) else "",
)
def test_an_answer_that_sees_its_batch_is_refused(
    spec: GraphSpec, edit: GraphEdit, checkpoint: Checkpoint, bundle_path: Path, tmp_path: Path
) -> None:
    proto = onnx.load(bundle_path / spec.file)
    edit(proto, checkpoint.model)
    onnx.save(proto, tmp_path / spec.file)
    with pytest.raises(ParityError, match=f"{spec.name}: .* depends on more than its question: in a batch of five"):
        dependence(checkpoint, spec, tmp_path / spec.file, 1e-5)


@pytest.mark.parametrize("spec", [VISION_ENCODER, ATTRIBUTE_HEADS], ids=lambda s: s.name)
def test_activations_scaled_per_tensor_are_refused(spec: GraphSpec, checkpoint: Checkpoint, bundle_path: Path, tmp_path: Path) -> None:
    """ONNX Runtime's dynamic 8 bits: the largest number of the whole batch sets everyone's steps."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(bundle_path / spec.file, tmp_path / spec.file, per_channel=True, weight_type=QuantType.QInt8)
    with pytest.raises(ParityError, match=f"{spec.name}: .* depends on more than its question"):
        dependence(checkpoint, spec, tmp_path / spec.file, 1e-5)


Arrays = Mapping[str, NDArray[Any]]


def _first_only(given: Arrays) -> Arrays:
    """Right for the first of a batch, and off for all others."""
    answer = given["image_tokens"].mean(axis=(1, 2))
    answer[1:] += 1e-3
    return {"target_tokens": answer[:, None, None]}


def _padding_counts(given: Arrays) -> Arrays:
    return {"base_query": np.full((len(given["input_ids"]), 1), given["input_ids"].shape[1], np.float32)}


def _last_of_five(given: Arrays) -> Arrays:
    return {"target_tokens": np.where(np.arange(len(given["image_tokens"])) == 4, np.nan, 1.0)[:, None, None]}


@pytest.mark.parametrize(
    ("spec", "run", "said"),
    [
        (TARGET_ENCODER, _first_only, "in a batch of five"),
        (TARGET_ENCODER, _last_of_five, "by nan"),
        (QUERY_ENCODER, _padding_counts, f"padded to {LONGEST} tokens"),
    ],
    ids=["place", "not a number", "padding"],
)
def test_what_it_says(spec: GraphSpec, run: Callable[[Arrays], Arrays], said: str, checkpoint: Checkpoint) -> None:
    make = partial(random_inputs, spec, checkpoint.model.sizes, 100)
    with pytest.raises(ParityError, match=said) as caught:
        check_batch_dependence(spec, run, make, longest=LONGEST, bound=1e-5)
    assert "\n" not in str(caught.value)


def test_masked_positions_answer_nothing(checkpoint: Checkpoint) -> None:
    """Behind the mask a graph may say what it likes."""

    def run(given: Arrays) -> Arrays:
        values = given["fused_text"] if "fused_text" in given else np.repeat(given["input_ids"][..., None], 2, axis=2).astype(np.float32)
        return {"fused_text": np.where(given["attention_mask"][..., None] == 1, 7.0, values)}

    make = partial(random_inputs, QUERY_ENCODER, checkpoint.model.sizes, 100)
    assert check_batch_dependence(QUERY_ENCODER, run, make, longest=LONGEST, bound=0.0) == 0.0
