"""Zone selection on one CUDA device against PyTorch and FAISS: answers compared first, then interleaved rounds timed by events.

    python -m benchmarks.gpu_zones --out OUT        # writes OUT/gpu_zones.json and prints a table; --quick for a small run

Each time stands beside what was predicted for an H100 (gpu_zones_predicted.json, written before any run of this version); the verdict
at the end says where that was wrong, and where PyTorch is faster. Times are medians over rounds, from a CUDA event before a call to one
after it, so that what a call makes the host wait for counts. Operands are on the device beforehand. A plain device copy in the same
rounds is the ceiling that bandwidths are held against.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import cuda

WIDTH, K = 256, 100
ZONES = ZoneSpec(lo=0.1, hi=0.2, policy="softmax")
RANKS = ZoneSpec(lo=0.001, hi=0.01, bounds="rank", policy="softmax")
PREDICTED = Path(__file__).with_name("gpu_zones_predicted.json")
BATCHES = (1, 16, 64, 256, 1024)
SCREENED = "ours, f16 queries, screened"
UNDER_WAY, TOGETHER = "ours, f16 queries, four under way", 4
"""A call of this one starts several searches before it takes what they found; its time is divided by their number."""
MODES = (
    "ours, f32 queries",
    "ours, f16 queries",
    UNDER_WAY,
    "ours, f16 queries, sm_80",
    SCREENED,
    "ours, zones and picks",
    "ours, zones and picks, sm_80",
    "ours, own best and zones",
    "ours, own best and ranks",
)
CLOSE = 1.25
"""A time within this factor of the prediction is as predicted."""
PREDICTED_FOR = ((1_000_000, 1), (100_000, 32))
"""Items and tokens of the cases that there are predictions for."""
Call = Callable[[], Any]


def unit(torch: Any, *shape: int, seed: int) -> Any:
    made = torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    return made / made.norm(dim=-1, keepdim=True)


def truth(torch: Any, queries: Any, items: Any) -> tuple[Any, Any]:
    """The best K in float64 of the vectors as stored: (B, K) scores and ids. `items` is (N, M, D)."""
    best = torch.empty(len(queries), 0, device="cuda", dtype=torch.float64)
    ids = torch.empty(len(queries), 0, device="cuda", dtype=torch.int64)
    step = max(1, (1 << 17) // items.shape[1])
    for first in range(0, len(items), step):
        part = items[first : first + step].double()
        scores = (queries.double() @ part.flatten(0, 1).T).view(len(queries), len(part), -1).amax(2)
        best = torch.cat([best, scores], 1)
        ids = torch.cat([ids, torch.arange(first, first + len(part), device="cuda").expand(len(queries), -1)], 1)
        best, places = best.topk(min(K, best.shape[1]), dim=1)
        ids = ids.gather(1, places)
    return best, ids


def ours(torch: Any, queries: Any, index: cuda.Index, **options: Any) -> Call:
    stream = torch.cuda.current_stream().cuda_stream

    def call() -> tuple[Any, Any]:
        searches = 1 if options.get("sync", True) else TOGETHER
        for result in [index.select(queries, k=K, stream=stream, **options) for _ in range(searches)]:
            found = torch.from_dlpack(result.scores), torch.from_dlpack(result.ids)
        return found

    return call


def torch_flat(torch: Any, queries: Any, items: Any) -> Call:
    """f16 product into a matrix made beforehand, then topk."""
    half, flat = queries.half(), items[:, 0]
    scores = torch.empty(len(queries), len(flat), device="cuda", dtype=torch.float16)
    return lambda: torch.topk(torch.matmul(half, flat.T, out=scores), K, dim=1)


def torch_maxsim(torch: Any, queries: Any, items: Any, chunk: int = 8192) -> Call:
    half = queries.half()

    def call() -> Any:
        parts = [torch.einsum("bd,nmd->bnm", half, items[a : a + chunk]).amax(2) for a in range(0, len(items), chunk)]
        return torch.topk(torch.cat(parts, 1), K, dim=1)

    return call


def faiss_flat(torch: Any, queries: Any, items: Any) -> Call:
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    index = faiss.GpuIndexFlatIP(resources, WIDTH, config)
    for first in range(0, len(items), 1 << 17):
        index.add(items[first : first + (1 << 17), 0].float())
    return lambda: (resources, index.search(queries, K))[1]


def agreement(torch: Any, answer: Any, best: Any, ids: Any, queries: Any, items: Any) -> dict[str, float]:
    """Error of the returned scores, how far the returned ids are from the best by true score, and the share of equal ids."""
    scores, found = answer[0].double(), answer[1].long()
    own = torch.einsum("bd,bkmd->bkm", queries.double(), items[found].double()).amax(2)
    return {
        "score_error": float((scores - own).abs().max()),
        "loss": float((best - own.sort(dim=1, descending=True).values).max()),
        "same_ids": float((found[:, :, None] == ids[:, None, :]).any(2).double().mean()),
    }


def interleave(torch: Any, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):  # three to warm up
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                times[name].append(start.elapsed_time(stop) / (TOGETHER if name == UNDER_WAY else 1))
    return times


def measure(torch: Any, label: str, batch: int, items: Any, rounds: int, with_faiss: bool = False) -> dict[str, Any]:
    """One case: our modes, PyTorch, FAISS where asked for, and a plain copy. A wrong answer is said, and its times are kept."""
    queries = unit(torch, batch, WIDTH, seed=1000 + batch)  # the items have seeds of their own
    size, tokens = items.shape[:2]
    zoned: dict[str, Any] = {"zones": ZONES, "picks": 16, "counts": True}
    anchored = {"anchor": torch.full((batch,), 0.5, device="cuda"), **zoned}
    ranked: dict[str, Any] = {**zoned, "zones": RANKS}
    modes = ((half, zones) for half in (False, True) for zones in (ZONES, RANKS))
    needed = max(cuda.workspace_bytes(batch, tuple(items.shape), half_queries=half, k=K, zones=zones, picks=16) for half, zones in modes)
    stream = torch.cuda.current_stream().cuda_stream
    index, screened = cuda.Index(items, stream=stream), cuda.Index(items, stream=stream, screen=True)
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    options: tuple[dict[str, Any], ...] = (
        *({}, {}, {"sync": False}, {"portable": True}, {}),
        *(anchored, {"portable": True, **anchored}, zoned, ranked),
    )
    calls: dict[str, Call] = {
        name: ours(torch, queries.half() if "f16" in name else queries, screened if name == SCREENED else index, **given)
        for name, given in zip(MODES, options, strict=True)
    }
    calls["PyTorch"] = (torch_flat if tokens == 1 else torch_maxsim)(torch, queries, items)
    if with_faiss:
        calls["FAISS-GPU flat f16"] = faiss_flat(torch, queries, items)
    best, ids = truth(torch, queries, items)
    agreements = {}
    for name, call in calls.items():
        agreements[name] = agreement(torch, call(), best, ids, queries, items)
        # f16 queries and f16 scores carry a rounding of their own.
        tolerance = 5e-6 if name.startswith("ours") and "f16" not in name else 5e-3
        if not (agreements[name]["score_error"] < tolerance and agreements[name]["loss"] < tolerance):
            print(f"WRONG ANSWER: {label}, B = {batch}, {name}: {agreements[name]}", flush=True)
    print(
        f"{label}, B = {batch}: {screened.describe(batch, K, half_queries=True)}", flush=True
    )  # after one search, which has told how much bounds leave
    calls["copy"] = lambda: target.copy_(source)
    times = interleave(torch, calls, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy = 2 * source.numel() / medians["copy"] / 1e6  # GB/s, read and written
    kernels = index.architecture(batch, half_queries=True)
    zone_kernels = index.architecture(batch, zones=ZONES, own_best=False)
    by = f"top-k by {kernels}, zones by {zone_kernels}"
    print(f"\n{label}: B = {batch}, {size} x {tokens} x {WIDTH} f16; plain copy {copy:.0f} GB/s; {by}", flush=True)
    nbytes = items.numel() * 2
    expected = predictions().get(f"{label}, {batch}", {}) if (size, tokens) in PREDICTED_FOR else {}
    for name, median in medians.items():
        if name != "copy":
            rate, ratio = nbytes / median / 1e6, medians["PyTorch"] / median
            beside = f"   predicted {expected[name]['ms']:.3f}" if name in expected else ""
            print(f"  {name:27s} {median:8.3f} ms   {rate:6.0f} GB/s ({rate / copy:4.0%})   {ratio:5.2f} x PyTorch{beside}")
    return {
        "label": label,
        "batch": batch,
        "items": [size, tokens, WIDTH],
        "k": K,
        "bytes": nbytes,
        "workspace_bytes": needed,
        "architecture": kernels,
        "zone_architecture": zone_kernels,
        "copy_gb_per_s": copy,
        "agreement": agreements,
        "milliseconds": times,
        "predicted_milliseconds": {name: found["ms"] for name, found in expected.items()},
    }


def predictions() -> dict[str, dict[str, dict[str, Any]]]:
    """For "LABEL, BATCH" and a contender: `ms`, and `why`."""
    read: dict[str, dict[str, dict[str, Any]]] = json.loads(PREDICTED.read_bytes())
    return read


def verdict(cases: list[dict[str, Any]]) -> list[str]:
    """Where times are not as predicted, and where one of ours is slower than PyTorch; one line each, and one of totals."""
    lines, compared, missed, lost = [], 0, 0, 0
    for case in cases:
        medians = {name: statistics.median(values) for name, values in case["milliseconds"].items()}
        for name, median in medians.items():
            where = f"{case['label']}, B = {case['batch']}, {name}"
            if predicted := case["predicted_milliseconds"].get(name):
                compared += 1
                if not 1 / CLOSE <= (ratio := median / predicted) <= CLOSE:
                    missed += 1
                    lines.append(f"{where}: {median:.3f} ms, {ratio:.2f} x the {predicted:.3f} that were predicted")
            if name.startswith("ours") and (ratio := medians["PyTorch"] / median) < 1:
                lost += 1
                lines.append(f"{where}: {median:.3f} ms, slower than PyTorch's plain topk ({ratio:.2f} x)")
    return [*lines, f"VERDICT: {compared - missed} of {compared} as predicted (within {CLOSE} x); slower than PyTorch in {lost} cases"]


def hardware(torch: Any) -> dict[str, Any]:
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "driver": driver.stdout.strip(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the items, few rounds")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="queries at a time (top-k)")
    parser.add_argument("--faiss", action="store_true", help="FAISS-GPU too, and top-k alone; in a run of its own")
    parser.add_argument("--once", action="store_true", help="one call of ours for a profiler, nothing else")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    scale, rounds = (10, 5) if options.quick else (1, 30)
    flat = torch.cat([unit(torch, 100_000 // scale, 1, WIDTH, seed=s).half() for s in range(10)])
    if options.once:
        index = cuda.Index(flat, stream=torch.cuda.current_stream().cuda_stream)
        for batch in (1, 64, 256):
            ours(torch, unit(torch, batch, WIDTH, seed=1064).half(), index)()
        zoned = {"zones": ZONES, "picks": 16, "counts": True}
        for batch, anchors in ((256, {"anchor": np.full(256, 0.5, np.float32)}), (64, {})):  # from registers; from kept scores
            ours(torch, unit(torch, batch, WIDTH, seed=1064).half(), index, **anchors, **zoned)()
        index = cuda.Index(flat, stream=torch.cuda.current_stream().cuda_stream, screen=True)
        ours(torch, unit(torch, 64, WIDTH, seed=1064).half(), index)()
        torch.cuda.synchronize()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []

    def add(case: dict[str, Any]) -> None:
        """Each case is on disk before the next begins."""
        cases.append(case)
        (options.out / "gpu_zones.json").write_text(json.dumps({"schema": 1, "hardware": hardware(torch), "cases": cases}, indent=1))

    for batch in options.batches:
        add(measure(torch, "top-k", batch, flat, rounds, options.faiss))
    del flat
    if not options.faiss:
        tokens = torch.cat([unit(torch, 10_000 // scale, 32, WIDTH, seed=s).half() for s in range(10)])
        add(measure(torch, "MaxSim", 64, tokens, rounds))
    print("\n" + "\n".join(verdict(cases)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
