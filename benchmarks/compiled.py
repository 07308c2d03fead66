"""Graphs of a float32 bundle beside torch.compile, in turns in one process.

    python -m benchmarks.compiled demo/bundle demo/runs/dqe-0/model

On a shared machine others take the processors now and then. A sample during which the process's threads waited for a processor for more
than a twentieth of its time is left out (`/proc/self/task/*/schedstat`, so Linux alone); the table says how many are left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import GRAPHS, GraphSpec
from dqe_engine.doctor.machine import processor_name
from dqe_engine.processors import cores
from dqe_export.graphs import graph_module, random_inputs
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.model import DQEModel

from .harness import SETTLE_SECONDS, AnswerMismatchError

COMPILED, EAGER, OURS = "torch.compile", "PyTorch eager", "ours"
TOLERANCE = 2e-5
"""Of any number that the graphs of a float32 bundle may differ by (docs/export.md)."""
_WAITED = 0.05


def waited_seconds() -> float:
    """How long the threads of this process have been ready to run, and did not."""
    return sum(int(path.read_text().split()[1]) for path in Path("/proc/self/task").glob("*/schedstat")) / 1e9


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each round; NaN where others had the processors."""
    times = {name: np.full(rounds, np.nan) for name in calls}
    for at in range(rounds):
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            call()  # its weights and code are in the caches again
            waited, begun = waited_seconds(), time.perf_counter()
            call()
            taken = time.perf_counter() - begun
            if waited_seconds() - waited <= _WAITED * taken:
                times[name][at] = 1000 * taken
    return times


@torch.inference_mode()
def measure(spec: GraphSpec, bundle: Bundle, model: DQEModel, *, batch: int, rounds: int) -> dict[str, NDArray[np.float64]]:
    """Raises AnswerMismatchError where a contender's outputs are not PyTorch's."""
    tensors = random_inputs(spec, model.sizes, model.embeddings.word_embeddings.num_embeddings, batch=batch, text_length=12, seed=0)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    module, session = graph_module(spec, model), bundle.session(spec, provider="cpu")
    compiled: Any = torch.compile(module, dynamic=True)
    calls: dict[str, Callable[[], object]] = {
        COMPILED: lambda: compiled(**tensors),
        EAGER: lambda: module(**tensors),
        OURS: lambda: tuple(session.run(**arrays).values()),
    }
    expected = _outputs(calls[EAGER]())
    for name, call in calls.items():
        error = max(float(np.abs(a - b).max()) for a, b in zip(_outputs(call()), expected, strict=True))
        if error > TOLERANCE * max(1.0, *(float(np.abs(a).max()) for a in expected)):
            raise AnswerMismatchError(f"{name}, {spec.name}: {error:.1e} from PyTorch")
    return in_turns(calls, rounds)


def row(spec: GraphSpec, batch: int, times: Mapping[str, NDArray[np.float64]]) -> str:
    """Medians, the median over rounds of torch.compile's time over the others', and how many samples of each are left."""
    kept = {name: values[np.isfinite(values)] for name, values in times.items()}
    cells = [f"{np.median(values):.2f}" if len(values) else "–" for values in kept.values()]
    for name in (EAGER, OURS):
        ratio = times[COMPILED] / times[name]
        cells.append(f"{np.nanmedian(ratio):.2f}" if np.isfinite(ratio).any() else "–")
    return f"| {spec.name} | {batch} | {' | '.join(cells)} | {', '.join(str(len(values)) for values in kept.values())} |"


def _outputs(raw: Any) -> tuple[NDArray[np.float32], ...]:
    return tuple(np.asarray(value) for value in (raw if isinstance(raw, tuple) else (raw,)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="compiled", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, action="append", help="repeatable (default: 1, 8 and 64)")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    bundle, model = Bundle.load(options.bundle), load_checkpoint(options.checkpoint).model.eval()
    print(f"{processor_name()}, {cores()} cores; milliseconds\n")
    print(f"| graph | batch | {COMPILED} | {EAGER} | {OURS} | {EAGER}: times {COMPILED} | {OURS}: times {COMPILED} | samples left |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for spec in GRAPHS:
        for batch in options.batch or (1, 8, 64):
            print(row(spec, batch, measure(spec, bundle, model, batch=batch, rounds=options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
