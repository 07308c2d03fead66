"""Milliseconds of the exported graphs beside PyTorch's on the machine that exports: for the report, never a gate."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dqe_engine.contracts.graphs import GraphSpec, graphs_of
from dqe_engine.contracts.parsing import Contract
from dqe_engine.sessions import OnnxSession
from dqe_training.machine import Company
from dqe_training.model import DQEModel

from .graphs import graph_module, random_inputs

BATCHES = (1, 8)
_CALLS = ((20, 0.0), (10, 0.3), (1, 5.0))
"""For a batch size: 20 calls of each are enough, and fewer once the two together took so many seconds."""


class Spread(Contract, frozen=True):
    """Of the calls, in milliseconds: a quarter took `p25` or less, half `median`, three quarters `p75`."""

    p25: float
    median: float
    p75: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        return cls(*(1000 * float(value) for value in np.quantile(seconds, (0.25, 0.5, 0.75))))


class GraphLatency(Contract, frozen=True):
    """`calls` of each in turns: PyTorch eager (float32), and ONNX Runtime's CPU provider on the exported graph."""

    batch: int
    calls: int
    pytorch: Spread
    runtime: Spread


@torch.inference_mode()
def time_graphs(
    model: DQEModel, directory: Path, advance: Callable[[str], None] = lambda stage: None
) -> tuple[dict[str, tuple[GraphLatency, ...]], float | None]:
    """The latencies of each graph in `directory`, and the share of the processors' time that other processes took meanwhile (`Company`).

    Texts have 12 tokens, or as many as the model takes.
    """
    company, found = Company(), {}
    for spec in graphs_of(model.sizes):
        advance(f"timing {spec.name}")
        session, module = OnnxSession(directory / spec.file, spec, model.sizes, provider="cpu"), graph_module(spec, model)
        with company:
            found[spec.name] = tuple(_time(spec, model, module, session, batch) for batch in BATCHES)
    return found, company.share


def _time(spec: GraphSpec, model: DQEModel, module: torch.nn.Module, session: OnnxSession, batch: int) -> GraphLatency:
    vocab_size = model.embeddings.word_embeddings.num_embeddings
    length = min(12, model.config.qformer.max_text_length)
    inputs = random_inputs(spec, model.sizes, vocab_size, batch=batch, text_length=length, seed=1)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    contenders: tuple[Callable[[], object], ...] = (partial(module, **inputs), partial(session.run, **arrays))
    times: list[list[float]] = [[], []]
    started = time.perf_counter()
    for call in contenders:
        call()
    while not any(len(times[0]) >= calls and time.perf_counter() - started >= seconds for calls, seconds in _CALLS):
        for call, taken in zip(contenders, times, strict=True):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
    return GraphLatency(batch, len(times[0]), *(Spread.of(taken) for taken in times))
