"""The query to measure, by kind of reference and batch, and who answers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import machine
from ..harness import Agreement, Contender
from . import searchers as by
from .checks import Answer, compare
from .setting import Kind, Setting, workload

OURS, INT8, EAGER = "ours f32", "ours int8", "PyTorch eager"
COMPILED, FLAT, HNSW = "torch.compile", "ONNX Runtime + FAISS flat, all tokens", "ONNX Runtime + FAISS HNSW, all tokens"
ONE_VECTOR = "PyTorch + FAISS flat, one vector"
OURS_GPU, EAGER_GPU = "ours, GPU", "PyTorch eager, GPU"
ZONES = "ours f32, zones"
NO_GPU = "not run: no GPU"


class Cycle:
    """A call that searches one batch of the pool after another, always in the same order."""

    def __init__(self, searcher: by.Searcher, setting: Setting, kind: Kind, size: int) -> None:
        work = workload(setting)
        self.searcher, self._k = searcher, setting.k
        self._batches = [work.batch(kind, number, size) for number in range(-(-setting.pool // size))]
        self._next = 0

    def __call__(self) -> list[by.Ranking]:
        references, texts = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        return self.searcher.search(references, texts, self._k)


@dataclass(frozen=True, slots=True)
class QueryCase:
    """`batch` queries a call, from file or id and text to ranked ids, over the setting's gallery."""

    setting: Setting
    kind: Kind
    batch: int
    compiled: bool = True
    """Also with torch.compile, which takes a minute of compiling."""

    @property
    def label(self) -> str:
        return f"{self.kind} reference, {self.setting.items:,} items, B = {self.batch}"

    @property
    def calls(self) -> int:
        """How many answer the whole pool; the last one begins it anew where the pool is no multiple of the batch."""
        return -(-self.setting.pool // self.batch)

    def describe(self) -> dict[str, Any]:
        s = self.setting
        return {"kind": self.kind, "batch": self.batch, "items": s.items, "pool": s.pool, "k": s.k, "threads": s.threads}

    def small(self) -> QueryCase:
        return dataclasses.replace(self, batch=1)

    def inputs(self) -> Setting:
        return self.setting

    def contenders(self) -> Sequence[Contender]:
        return [
            self._contender(OURS, lambda setting: by.ours(setting, "f32"), exact=True),
            self._contender(INT8, lambda setting: by.ours(setting, "int8"), unavailable=self.setting.int8_missing),
            self._contender(EAGER, by.pytorch, exact=True),
            self._contender(COMPILED, partial(by.pytorch, compiled=True), exact=True, unavailable=None if self.compiled else "left out"),
            self._contender(FLAT, partial(by.faiss_tokens, hnsw=False), exact=True, package="faiss"),
            self._contender(HNSW, partial(by.faiss_tokens, hnsw=True), package="faiss"),
            self._contender(ONE_VECTOR, by.faiss_one_vector, package="faiss"),
            self._contender(OURS_GPU, lambda setting: by.ours(setting, "f32", "cuda"), unavailable=without_gpu()),
            self._contender(EAGER_GPU, partial(by.pytorch, device="cuda"), unavailable=without_gpu()),
        ]

    def _contender(
        self, name: str, open_searcher: Callable[[Setting], by.Searcher], *, exact: bool = False, package: str | None = None,
        unavailable: str | None = None,
    ) -> Contender:  # fmt: skip
        def answer(raw: Any) -> Answer:
            batches: list[list[by.Ranking]] = raw if self.calls > 1 else [raw]
            return Answer([ranking for batch in batches for ranking in batch][: self.setting.pool], exact)

        return Contender(
            name, lambda setting: Cycle(open_searcher(setting), setting, self.kind, self.batch), answer, package,
            lambda: unavailable, self.calls,
        )  # fmt: skip

    def checker(self, inputs: Setting) -> Callable[[Answer], Agreement]:
        truth, positions = np.load(inputs.truth_file(self.kind)), workload(inputs).position
        return lambda answer: compare(answer, positions, truth, inputs.k)


def without_gpu() -> str | None:
    return None if machine.cuda_devices() else NO_GPU


_MAIN_WAYS: Mapping[str, Callable[[Setting], by.Searcher]] = {
    OURS: lambda setting: by.ours(setting, "f32"),
    EAGER: by.pytorch,
    INT8: lambda setting: by.ours(setting, "int8"),
    OURS_GPU: lambda setting: by.ours(setting, "f32", "cuda"),
    EAGER_GPU: lambda setting: by.pytorch(setting, "cuda"),
    ZONES: lambda setting: by.EngineSearcher(by.ours(setting, "f32").served, zones=True),
}


def main_ways(setting: Setting) -> tuple[list[str], dict[str, str]]:
    """Names of ours and PyTorch's searchers that can run here, and of the others why they cannot."""
    no_gpu = without_gpu()
    reasons = {INT8: setting.int8_missing, OURS_GPU: no_gpu, EAGER_GPU: no_gpu}
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in (OURS, EAGER, INT8, OURS_GPU, EAGER_GPU) if name not in missing], missing


@cache
def open_way(setting: Setting, name: str) -> by.Searcher:
    """The searcher of that name, the same one again in the same process."""
    return _MAIN_WAYS[name](setting)


def gpu_not_measured() -> dict[str, str]:
    """Of sections that measure processors alone."""
    return dict.fromkeys((OURS_GPU, EAGER_GPU), without_gpu() or "not measured in this section")


def known_contenders() -> Sequence[Contender]:
    """All there are, whatever the setting."""
    nowhere = Path()
    return QueryCase(Setting(nowhere, nowhere, nowhere, nowhere, 1, 1, 1), "catalogue", 1).contenders()
