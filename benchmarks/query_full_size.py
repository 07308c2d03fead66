"""One query at BLIP-2's full size, end to end: the engine on an int8 bundle beside PyTorch eager in float32, both on random weights.

    python -m benchmarks.export_full_size --tower vit-g --precisions int8 --keep     # once: 20 minutes, 16 GiB
    python -m benchmarks.query_full_size

    python -m benchmarks.export_full_size --tower vit-g --blocks 1 --base-query two_pass --precisions int8 --keep
    python -m benchmarks.query_full_size --checkpoint build/full-size/vit-g-two_pass-1-blocks \
        --bundle build/full-size/vit-g-two_pass-1-blocks-int8

A catalogue reference (cached image tokens) and a text, over items of random target tokens. Random weights flatter what rounding keeps,
so the overlap that is printed says that both do the same work, and no more; docs/export.md has what int8 keeps of a trained model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.engine import RetrievalEngine

from . import machine, report
from .harness import Agreement, Contender, Rounds, Turns, ratio
from .isolated import add_alone
from .sections import recorded
from .serving.searchers import EngineSearcher, Ranking, TorchFiles, TorchSearcher

_ROOT = Path(__file__).parent
_PACKAGES = ("dqe-engine", "onnxruntime", "torch", "transformers", "tokenizers")
OURS, EAGER = "ours int8", "PyTorch eager"
REFERENCES, K, BLOCKS = 32, 10, 5
TEXTS = ("is red and has stripes", "the same in blue, with long sleeves", "plain and shorter", "has dots instead of checks")
_ROUNDS = Rounds(minimum=5, maximum=10, seconds=2.0)
LEAST_OVERLAP = 0.8
"""Of the first ten, as the export's gate has it for int8."""


@dataclass(frozen=True)
class FullSizeQuery:
    """Single queries, another one in every call."""

    checkpoint: Path
    bundle: Path
    items: int
    threads: int
    folder: Path
    label: str = "full-size query"

    def describe(self) -> dict[str, Any]:
        return {"items": self.items, "batch": 1, "kind": "catalogue", "k": K}

    def small(self) -> FullSizeQuery:
        return self

    def inputs(self) -> dict[str, Any]:
        engine = RetrievalEngine.load(self.bundle, provider="cpu", threads=self.threads, verify=False, kept_bytes=0)
        sizes, rng = engine.bundle.sizes, np.random.default_rng(0)
        targets = rng.standard_normal((self.items, sizes.target_tokens, sizes.embedding_dim), np.float32)
        targets /= np.linalg.norm(targets, axis=2, keepdims=True)
        images = rng.standard_normal((REFERENCES, sizes.image_tokens, sizes.vision_width), np.float32).astype(np.float16)
        ids = [str(number) for number in range(self.items)]
        index = engine.new_index()
        for start in range(0, self.items, 8 * REFERENCES):
            rows = np.arange(start, min(start + 8 * REFERENCES, self.items))
            index.add([ids[row] for row in rows], targets[rows], images[rows % REFERENCES])
        return {"engine": engine, "ids": ids, "targets": targets, "files": self._files(ids, images)}

    def _files(self, ids: list[str], images: NDArray[np.float16]) -> TorchFiles:
        names = {name: str(self.folder / name) for name in ("targets.npy", "images.npy", "ids.json")}
        np.save(names["images.npy"], images)
        Path(names["ids.json"]).write_text(json.dumps(ids[:REFERENCES]))
        return TorchFiles(str(self.checkpoint), names["targets.npy"], names["images.npy"], names["ids.json"], self.threads)

    def contenders(self) -> Sequence[Contender]:
        def ours(inputs: dict[str, Any]) -> Callable[[], list[Ranking]]:
            return _asking(EngineSearcher(inputs["engine"]))

        def eager(inputs: dict[str, Any]) -> Callable[[], list[Ranking]]:
            return _asking(TorchSearcher(inputs["files"], gallery=(inputs["ids"], inputs["targets"])))

        calls = len(TEXTS)
        return (Contender(EAGER, eager, checked_calls=calls), Contender(OURS, ours, checked_calls=calls))

    def checker(self, inputs: dict[str, Any]) -> Callable[[list[list[Ranking]]], Agreement]:
        truth: list[set[str]] = []

        def check(answers: list[list[Ranking]]) -> Agreement:
            found = [{id for id, _ in rankings[0]} for rankings in answers]
            if not truth:  # PyTorch's, which comes first
                truth.extend(found)
            overlap = float(np.mean([len(a & b) / K for a, b in zip(found, truth, strict=True)]))
            return Agreement(overlap >= LEAST_OVERLAP, 0.0, overlap, f"{100 * overlap:.0f} % of PyTorch's first ten")

        return check


def _asking(searcher: EngineSearcher | TorchSearcher) -> Callable[[], list[Ranking]]:
    """Each call asks the next query; all ways start at the first."""
    asked = 0

    def ask() -> list[Ranking]:
        nonlocal asked
        asked += 1
        return searcher.search([str(asked % REFERENCES)], [TEXTS[asked % len(TEXTS)]], K)

    return ask


def measure(checkpoint: Path, bundle: Path, items: int, threads: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        case = FullSizeQuery(checkpoint, bundle, items, threads, Path(folder))
        turns = Turns(case, _ROUNDS)
        for _ in range(BLOCKS):
            turns.block()
        found = turns.results()
        add_alone([case], [found], _ROUNDS, threads, step=lambda text: print(text, file=sys.stderr), blocks=BLOCKS)
    results = {result.name: result for result in found}
    eager, ours = results[EAGER].best, results[OURS].best
    assert eager is not None
    assert ours is not None
    return {"case": case.describe(), "contenders": [r.record() for r in results.values()], "times_as_fast": ratio(eager, ours)}


def main(arguments: Sequence[str] | None = None) -> int:
    work = _ROOT.parent / "build" / "full-size"
    parser = argparse.ArgumentParser(prog="query_full_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=work / "vit-g", help="with random weights (default: build/full-size/vit-g)")
    parser.add_argument("--bundle", type=Path, default=work / "vit-g-int8", help="exported from it (default: build/full-size/vit-g-int8)")
    parser.add_argument("--items", type=int, default=5000, help="size of the gallery (default: 5000)")
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / machine.slug(), help="folder for results")
    options = parser.parse_args(arguments)
    for path in (options.checkpoint, options.bundle):
        if not path.exists():
            parser.exit(2, f"error: {path} is not there; make it with python -m benchmarks.export_full_size --precisions int8 --keep\n")
    threads = machine.cores()
    section = recorded(
        partial(measure, options.checkpoint, options.bundle, options.items, threads), _PACKAGES, quick=False, threads=threads
    )
    path = options.out / "query-full-size.json"
    record = report.load(path, "query-full-size")
    record["sections"]["query" if options.bundle == work / "vit-g-int8" else options.bundle.name] = section
    report.save_json(path, record)
    rows = [
        [
            c["name"],
            report.milliseconds(c["median_s"]),
            report.milliseconds(c[c["counted"]]["p95_s"]),
            f"{100 * c['answer']['same_ids']:.0f} %",
        ]
        for c in section["contenders"]
    ]
    print(report.table(["one query", "median, ms", "p95, ms", "of PyTorch's first ten"], rows))
    print("{:.2f} times as fast [{:.2f}, {:.2f}]".format(*section["times_as_fast"]))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
