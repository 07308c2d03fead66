"""Exported graphs on ONNX Runtime's CUDA provider against PyTorch on the same device: answers first, then latencies.

    python -m benchmarks.gpu_graphs measure FOLDER/full query_encoder --out OUT --work TMP     # FOLDER: from gpu_graphs_prepare
    python -m benchmarks.gpu_graphs compile FOLDER/full query_encoder --out OUT --work TMP     # PyTorch's own compiler; minutes

Inputs and outputs are on the device, float32 as the graphs have them. A latency is the wall time of a call to the end of the device's
work; contenders of a case take turns. Every figure is in OUT/gpu_graphs.json as soon as it is there, beside what was predicted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqe_engine.contracts.manifest import Tolerance
from dqe_export.differences import TOLERANCES

from . import report
from .gpu_graphs_model import (
    CAPTURED,
    COMPILED,
    EAGER,
    EXACT,
    F16,
    F32,
    FIXED,
    FOR_GPUS,
    LAYERS,
    MARKS,
    REPLAYED,
    SEEN,
    SPECS,
    TENSORRT,
    TENSORRT_FOR_GPUS,
    WARM_UP,
    Call,
    Model,
    Tensors,
    has_tensorrt,
)  # fmt: skip
from .gpu_zones import hardware

PREDICTED = Path(__file__).with_name("gpu_graphs_predicted.json")
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 300
_ALL, _FEW = (1, 8, 64), (1, 8)
PHASES = (
    ((F16, EAGER, REPLAYED), _ALL), ((F32, EXACT), _ALL), ((SEEN, F16), _ALL), ((FOR_GPUS, F16), _ALL), ((FIXED, CAPTURED), _FEW),
    ((TENSORRT, TENSORRT_FOR_GPUS), _FEW),
)  # fmt: skip
"""Contenders that take turns and the batches to try them at, in order of value: what may crash the process comes late."""


class Record:
    """OUT/gpu_graphs.json: rows of all runs so far."""

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.about = out / "gpu_graphs.json", about
        self.document = report.load(self.path, "gpu_graphs")
        self.document["hardware"] = hardware(torch) if torch.cuda.is_available() else {"device": "cpu"}
        self.predicted: dict[str, Any] = json.loads(PREDICTED.read_bytes()) if torch.cuda.is_available() else {}

    def add(self, kind: str, **row: Any) -> None:
        self.document["sections"].setdefault(kind, []).append({**self.about, **row})
        report.save_json(self.path, self.document)

    def opened(self, contender: str, batch: int, seconds: float, nodes: Mapping[str, Any]) -> None:
        self.add("sessions", contender=contender, batch=batch, seconds=seconds, nodes=nodes)
        if "on the CPU" in nodes:
            print(f"  {contender}: {nodes}", flush=True)

    def prediction(self, batch: int, contender: str) -> tuple[float, str] | None:
        found = self.predicted.get(f"{self.about['model']}/{self.about['graph']}", {}).get(str(batch), {}).get(contender)
        return None if found is None else (found["ms"], found["why"])


def difference(found: Tensors, expected: Tensors) -> dict[str, dict[str, float]]:
    """Per output, as the export's gate counts: errors relative to the largest value where that exceeds 1, and cosines of vectors."""
    errors = {}
    for name, wanted in expected.items():
        a, b = (t.detach().double().flatten(0, -2) for t in (found[name].to(wanted.device), wanted))
        error = (a - b).abs() / max(1.0, float(b.abs().max()))
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        cosine[(a == b).all(dim=-1)] = 1.0  # also two zero vectors, which have none
        errors[name] = {"max_error": float(error.max()), "mean_error": float(error.mean()), "min_cosine": float(cosine.min())}
    return errors


def add_parity(record: Record, contender: str, batch: int, found: Tensors, expected: Tensors, against: str = "PyTorch f32") -> None:
    tolerance = TOLERANCES["float16" if "f16" in contender else "float32"]
    errors = difference(found, expected)
    worst, cosine = max(e["max_error"] for e in errors.values()), min(e["min_cosine"] for e in errors.values())
    within = all(_keeps(e, tolerance) for e in errors.values())
    finite = {name: {key: value if math.isfinite(value) else None for key, value in error.items()} for name, error in errors.items()}
    record.add("parity", contender=contender, batch=batch, against=against, within=within, outputs=finite)
    verdict = "within the gate" if within else "BEYOND THE GATE"
    print(
        f"  parity B = {batch:2d} {contender:40s} against {against}: error {worst:.1e}, 1 - cosine {1 - cosine:.1e}, {verdict}", flush=True
    )


def _keeps(error: Mapping[str, float], tolerance: Tolerance) -> bool:
    """NaN does not."""
    bounds = ((error["max_error"], tolerance.max_error), (error["mean_error"], tolerance.mean_error))
    return all(value <= bound for value, bound in bounds if bound is not None) and error["min_cosine"] >= (tolerance.min_cosine or -1.0)


def add_latency(record: Record, batch: int, calls: Mapping[str, Call], seconds: float, wait: Callable[[], None]) -> None:
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for round_ in range(_MOST_ROUNDS):
        if round_ >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            wait()
            times[name].append(1000 * (time.perf_counter() - begun))
    for name, taken in times.items():
        p50, p99 = (float(np.percentile(taken, q)) for q in (50, 99))
        predicted = record.prediction(batch, name)
        record.add("latency", contender=name, batch=batch, p50_ms=p50, p99_ms=p99, predicted_ms=predicted and predicted[0],
                   samples_ms=[round(value, 4) for value in taken])  # fmt: skip
        beside = f"predicted {predicted[0]:.2f} ({p50 / predicted[0]:.2f} x)" if predicted else "not predicted"
        print(f"  time   B = {batch:2d} {name:40s} p50 {p50:8.3f} ms  p99 {p99:8.3f}  {beside}", flush=True)


def failed(record: Record, contender: str, batch: int, error: Exception) -> None:
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    record.add("errors", contender=contender, batch=batch, error=line)
    print(f"  FAILED B = {batch:2d} {contender}: {line}", flush=True)


def contenders(names: Sequence[str], model: Model) -> list[str]:
    """Those of `names` that there is a graph and a device for; none without what is compared."""
    missing = [name for name in names if name in MARKS and f"{model.spec.name}-f16-{MARKS[name]}" not in model.files]
    if names[0] in missing:
        return []
    found = []
    for name in names:
        if name in missing or (name in (TENSORRT, TENSORRT_FOR_GPUS) and not has_tensorrt()):
            continue
        if model.device == "cpu" and name in (REPLAYED, CAPTURED):
            continue
        found.append(name)
    return found


@dataclass(frozen=True)
class Comparison:
    """Contenders on one model's graph. `seconds`: of timing per case; `wait` for the device."""

    model: Model
    record: Record
    batches: Sequence[int]
    seconds: float
    wait: Callable[[], None]

    def everything(self, *, compiled: bool) -> None:
        inputs = {batch: self.model.inputs(batch) for batch in self.batches}
        truth = {batch: self.model.exact(given) for batch, given in inputs.items()}
        for phase, batches in PHASES:
            self.in_turns(phase, [batch for batch in self.batches if batch in batches], inputs, truth)
        self.on_the_cpu(inputs[self.batches[0]], truth[self.batches[0]])
        if compiled:
            self.in_turns((LAYERS, EAGER), [batch for batch in self.batches if batch != 8], inputs, truth)

    def whole_compiled(self) -> None:
        inputs = {batch: self.model.inputs(batch) for batch in self.batches}
        self.in_turns((COMPILED, EAGER), self.batches, inputs, {batch: self.model.exact(given) for batch, given in inputs.items()})

    def in_turns(self, names: Sequence[str], batches: Sequence[int], inputs: Mapping[int, Tensors], truth: Mapping[int, Tensors]) -> None:
        """Answers of each, then latencies in turns."""
        for batch in batches:
            calls: dict[str, Call] = {}
            for name in contenders(names, self.model):
                try:
                    started = time.perf_counter()
                    call = self.model.call(name, inputs[batch], self.record.opened)
                    found = call()
                    self.wait()
                    self.record.add("warm_up", contender=name, batch=batch, seconds=time.perf_counter() - started)
                    for _ in range(WARM_UP):  # the second call may be captured, the third replayed
                        found = call()
                    self.wait()
                    add_parity(self.record, name, batch, found, truth[batch])
                    calls[name] = call
                except Exception as error:  # one contender less; what it raises depends on the runtime
                    failed(self.record, name, batch, error)
            if calls:
                add_latency(self.record, batch, calls, self.seconds, self.wait)
        self.model.forget()

    def on_the_cpu(self, inputs: Tensors, truth: Tensors) -> None:
        """ONNX Runtime's CPU provider against PyTorch, and the device's against it."""
        batch = len(next(iter(inputs.values())))
        for precision, ours in (("f32", EXACT), ("f16", F16)):
            name = f"ORT CPU {precision}"
            try:
                found = self.model.call(name, inputs, self.record.opened)()
                add_parity(self.record, name, batch, found, truth)
                if self.model.device == "cuda":
                    on_device = self.model.call(ours, inputs, self.record.opened)()
                    self.wait()
                    add_parity(self.record, ours, batch, on_device, found, name)
            except Exception as error:  # as above
                failed(self.record, name, batch, error)
            self.model.forget()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_graphs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "compile"))
    parser.add_argument("folder", type=Path, help="one model's, from gpu_graphs_prepare")
    parser.add_argument("graphs", choices=SPECS, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for graphs with their weights; 7 GB at full size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per case (default: 1)")
    parser.add_argument("--layers", action="store_true", help="measure PyTorch with its layers compiled too, which takes half a minute")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False  # convolutions would use it unasked; matrix products do not

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    options.work.mkdir(parents=True, exist_ok=True)
    for graph in options.graphs:
        print(f"{options.folder.name} {graph}:", flush=True)
        record = Record(options.out, {"model": options.folder.name, "graph": graph})
        started = time.perf_counter()
        model = Model(options.folder, SPECS[graph], options.device, options.work if options.what == "measure" else None)
        wait()
        print(f"  weights made and written in {time.perf_counter() - started:.1f} s", flush=True)
        comparison = Comparison(model, record, options.batches, options.seconds, wait)
        with torch.inference_mode():
            if options.what == "measure":
                comparison.everything(compiled=options.layers)
            else:
                comparison.whole_compiled()
    return 0


if __name__ == "__main__":
    sys.exit(main())
