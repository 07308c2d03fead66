"""FAISS: which of the packages is installed, and a tiny search on the CPU and on a GPU if the package has one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .findings import NO_DEVICE, Context, Finding, Steps, Trying
from .twins import Twins

DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
INSTALL = "pip install 'dqe-engine[bench]'; only the benchmarks use it"


def probe(context: Context) -> Steps:
    twins = Twins("faiss", DISTRIBUTIONS, mark="IndexFlatIP", install=INSTALL)
    yield twins.trying()
    faiss, package = twins.load()
    yield package
    if faiss is None:
        return
    yield Trying("CPU search", twins.repair)
    yield _search(faiss, "CPU search", twins.repair, on_gpu=False)
    if hasattr(faiss, "StandardGpuResources"):
        yield Trying("GPU search", twins.repair)
        yield _gpu(faiss, twins.repair, context.devices)


def _gpu(faiss: Any, repair: str, devices: int) -> Finding:
    usable = faiss.get_num_gpus()
    if usable:
        return _search(faiss, "GPU search", repair, on_gpu=True)
    if devices:
        return Finding(
            "GPU search", "broken", f"sees none of {devices} CUDA devices", "install the CUDA libraries it was built for, or " + repair
        )
    return Finding("GPU search", "not available", "in the package, but there is no CUDA device", NO_DEVICE)


def _search(faiss: Any, name: str, repair: str, *, on_gpu: bool) -> Finding:
    vectors = np.eye(16, dtype=np.float32)
    index: Any = faiss.IndexFlatIP(16)
    if on_gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(vectors)
    _, ids = index.search(vectors[::-1].copy(), 1)
    found, wanted = ids[:, 0].tolist(), list(range(15, -1, -1))
    if found != wanted:
        return Finding(name, "broken", f"found {found}, expected {wanted}", repair)
    return Finding(name, "ok", f"finds what it should{f'; {faiss.get_num_gpus()} GPUs' if on_gpu else ''}")
