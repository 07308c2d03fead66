"""Parity of an exported graph with PyTorch, at shapes that it was not traced with."""

from __future__ import annotations

from pathlib import Path

import torch

from dqe_engine.contracts.graphs import GraphSpec
from dqe_engine.contracts.manifest import GraphParity
from dqe_engine.errors import ExportError
from dqe_engine.sessions import OnnxSession
from dqe_training.model import DQEModel

from .graphs import graph_module, random_inputs

TOLERANCE = {"float32": 1e-4}  # largest absolute difference of any output element
SHAPES: tuple[dict[str, int], ...] = (
    {"batch": 1, "text_length": 2},
    {"batch": 2, "text_length": 5},
    {"batch": 7, "text_length": 17},
    {"batch": 33, "text_length": 32},
)


@torch.inference_mode()
def check_parity(spec: GraphSpec, model: DQEModel, path: Path, *, precision: str = "float32") -> GraphParity:
    """Run `path` and PyTorch on the same random inputs. Raises ExportError when an output is off by more than allowed."""
    tolerance = TOLERANCE[precision]
    session = OnnxSession(path, spec, model.sizes, provider="cpu")
    module = graph_module(spec, model)
    longest = model.config.qformer.max_text_length
    vocab_size = model.embeddings.word_embeddings.num_embeddings
    shapes = tuple({**s, "text_length": min(s["text_length"], longest)} for s in SHAPES)
    worst = {t.name: 0.0 for t in spec.outputs}
    for seed, shape in enumerate(shapes, start=1):
        inputs = random_inputs(spec, model.sizes, vocab_size, seed=seed, **shape)
        expected = module(**inputs)
        found = session.run(**{name: value.numpy() for name, value in inputs.items()})
        for tensor, reference in zip(spec.outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
            error = (torch.from_numpy(found[tensor.name]) - reference).abs().max().item()
            if not error <= tolerance:  # NaN fails too
                raise ExportError(
                    f"{spec.name}: {tensor.name} differs from PyTorch by {error:.2e} at {shape}, "
                    f"more than {tolerance:.0e}; nothing was written"
                )
            worst[tensor.name] = max(worst[tensor.name], error)
    return GraphParity(graph=spec.name, max_abs_error=worst, tolerance=tolerance, shapes=shapes)
