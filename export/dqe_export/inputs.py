"""Random inputs of a graph, by its spec. Importing this loads no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.graphs import GraphSizes, GraphSpec


def random_arrays(
    spec: GraphSpec, sizes: GraphSizes, vocab_size: int, *, batch: int, text_length: int = 0, seed: int
) -> dict[str, NDArray[Any]]:
    """Inputs of one shape: normal floats, token ids of the whole vocabulary, masks with padding on the right."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        shape = tensor.shape(sizes, batch=batch, text_length=text_length)
        if tensor.name == "attention_mask":
            lengths = rng.integers(1, text_length + 1, (batch, 1))
            inputs[tensor.name] = (np.arange(text_length)[None, :] < lengths).astype(np.int64)
        elif tensor.dtype == "int64":
            inputs[tensor.name] = rng.integers(0, vocab_size, shape)
        else:
            inputs[tensor.name] = rng.standard_normal(shape, np.float32)
    return inputs
