"""What the machine can do at most: multiply-adds in registers, a plain matrix product, a plain copy and a plain read."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import numpy as np

from dqe_engine import _kernels

_GEMM_SIZE = 2048
_REPEATS = 7
_FMA_TRIES = 5


@dataclass(frozen=True, slots=True)
class Peaks:
    """The best of several tries, per second and over all threads."""

    fma_flops: float
    gemm_flops: float
    gemm_by: str
    copy_bytes: float
    """Bytes read plus bytes written."""
    read_bytes: float

    def record(self) -> dict[str, float | str]:
        return asdict(self)


def fma_flops(threads: int) -> float:
    """Two per multiply-add of a loop that stays in registers; the best of a few tries of milliseconds each."""
    return 2 * max(float(_kernels.multiply_add_rate(threads)) for _ in range(_FMA_TRIES))


def measure(threads: int, *, copied_bytes: int = 1 << 29) -> Peaks:
    size = _GEMM_SIZE if copied_bytes >= 1 << 28 else _GEMM_SIZE // 4
    products = _products(size, threads)
    seconds = {name: _best(product) for name, product in products.items()}
    fastest = min(seconds, key=lambda name: seconds[name])
    source = np.ones(copied_bytes // 4, np.float32)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # NumPy releases the interpreter's lock while it copies
        copy = _best(lambda: list(pool.map(lambda pair: np.copyto(*pair), parts)))
        read = _best(lambda: list(pool.map(lambda pair: pair[1].max(), parts)))
    return Peaks(
        fma_flops=max(fma_flops(threads) for _ in range(_REPEATS)),
        gemm_flops=2 * size**3 / seconds[fastest],
        gemm_by=fastest,
        copy_bytes=2 * copied_bytes / copy,
        read_bytes=copied_bytes / read,
    )


def _products(size: int, threads: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    c = np.empty_like(a)
    products: dict[str, Callable[[], object]] = {"NumPy": lambda: np.matmul(a, b, out=c)}
    if find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
        x, y, z = torch.from_numpy(a), torch.from_numpy(b), torch.empty((size, size))
        products["PyTorch"] = lambda: torch.matmul(x, y, out=z)
    return products


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, the first one not counted."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
