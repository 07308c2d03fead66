"""Random inputs of a graph, by its spec. Importing this loads no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.graphs import GraphSizes, GraphSpec


def random_arrays(
    spec: GraphSpec, sizes: GraphSizes, vocab_size: int, *, batch: int, text_length: int = 0, seed: int, full: bool = True
) -> dict[str, NDArray[Any]]:
    """Inputs of one shape: normal floats, token ids, masks with padding on the right but for the first text, which fills its row if `full`
    and else leaves at least one place, where there are two.

    No id comes twice before all of the vocabulary have come once; there are ids behind the mask too, where a service has padding.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        shape = tensor.shape(sizes, batch=batch, text_length=text_length)
        if tensor.name == "attention_mask":
            lengths = rng.integers(1, text_length + 1, (batch, 1))
            lengths[:1] = text_length if full else np.minimum(lengths[:1], max(text_length - 1, 1))
            inputs[tensor.name] = (np.arange(text_length)[None, :] < lengths).astype(np.int64)
        elif tensor.dtype == "int64":
            count = batch * text_length
            rounds = [rng.permutation(vocab_size) for _ in range(-(-count // vocab_size))]
            inputs[tensor.name] = np.concatenate(rounds)[:count].astype(np.int64).reshape(shape)
        else:
            inputs[tensor.name] = rng.standard_normal(shape, np.float32)
    return inputs
