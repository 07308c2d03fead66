"""Milliseconds of an exported graph beside PyTorch's on the machine that exports: for the report, never a gate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dqe_engine.contracts.graphs import GraphSpec
from dqe_engine.contracts.parsing import Contract
from dqe_engine.sessions import OnnxSession
from dqe_training.model import DQEModel

from .graphs import graph_module, random_inputs

BATCHES = (1, 8)
_ROUNDS, _SECONDS = 20, 5.0  # of both together, for a batch size


class GraphLatency(Contract, frozen=True):
    """Medians, in milliseconds, of calls in turns: PyTorch eager (float32), and ONNX Runtime's CPU provider on the exported graph."""

    batch: int
    pytorch_ms: float
    runtime_ms: float


@torch.inference_mode()
def time_graph(spec: GraphSpec, model: DQEModel, path: Path) -> tuple[GraphLatency, ...]:
    """Texts have 12 tokens, or as many as the model takes."""
    session, module = OnnxSession(path, spec, model.sizes, provider="cpu"), graph_module(spec, model)
    vocab_size = model.embeddings.word_embeddings.num_embeddings
    found = []
    for batch in BATCHES:
        length = min(12, model.config.qformer.max_text_length)
        inputs = random_inputs(spec, model.sizes, vocab_size, batch=batch, text_length=length, seed=1)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        contenders: tuple[Callable[[], object], ...] = (partial(module, **inputs), partial(session.run, **arrays))
        times: list[list[float]] = [[], []]
        started = time.perf_counter()
        for call in contenders:
            call()
        while len(times[0]) < 1 or (len(times[0]) < _ROUNDS and time.perf_counter() - started < _SECONDS):
            for call, taken in zip(contenders, times, strict=True):
                begun = time.perf_counter()
                call()
                taken.append(time.perf_counter() - begun)
        found.append(GraphLatency(batch, *(1000 * statistics.median(taken) for taken in times)))
    return tuple(found)
