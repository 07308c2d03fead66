"""Does an answer depend on anything but its question? Queries alone, in batches, in another order; an index by other batch sizes.

    python -m benchmarks.independence bundle-int8 --data demo/garments
    python -m benchmarks.independence bundle-int8 --data demo/garments --emulate "qemu-x86_64 -cpu max"    # AVX2, no AVX-512

With `--emulate`, a second interpreter under that command encodes some of the same images and queries, and the differences are printed:
QEMU's user mode has no AVX-512, so it stands for processors with AVX2 alone. Exit code 1 where a first ten changes with the batch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query
from dqe_engine.results import SearchResult
from dqe_training.data.records import TripletRecord
from dqe_training.evaluation.protocol import EvaluationSet, load_evaluation_set

from . import machine, report

QUERIES, ITEMS, EMULATED = 128, 2000, 16
K = 10


def answers(engine: RetrievalEngine, records: Sequence[TripletRecord], batch: int) -> list[SearchResult]:
    return [
        result
        for start in range(0, len(records), batch)
        for result in engine.search_batch([Query(reference_id=r.reference, text=r.text, k=K) for r in records[start : start + batch]])
    ]


def compare(alone: Sequence[SearchResult], other: Sequence[SearchResult]) -> tuple[int, float, float]:
    """Queries with the same first ten in the same order; the largest differences of a score and of an attribute weight."""
    same = sum([h.id for h in a.hits] == [h.id for h in b.hits] for a, b in zip(alone, other, strict=True))
    scores = max(abs(x.score - y.score) for a, b in zip(alone, other, strict=True) for x, y in zip(a.hits, b.hits, strict=True))
    weights = max(abs(a.weights[name] - b.weights[name]) for a, b in zip(alone, other, strict=True) for name in a.weights)
    return same, scores, weights


def indexed(bundle: Path, images: Path, evaluation: EvaluationSet, batch: int) -> RetrievalEngine:
    engine = RetrievalEngine.load(bundle, provider="cpu", kept_bytes=0)
    names = dict.fromkeys([*(r.reference for r in evaluation.records[:QUERIES]), *evaluation.gallery[:ITEMS]])
    engine.index_images({name: images / name for name in names}, batch_size=batch)
    return engine


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="independence", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a dataset folder, as dqe-data garments writes it")
    parser.add_argument("--emulate", metavar="COMMAND", help="also run under this emulator of another processor")
    options = parser.parse_args(arguments)
    evaluation = load_evaluation_set(options.data)
    records, images = evaluation.records[:QUERIES], options.data / "images"
    engine = indexed(options.bundle, images, evaluation, 32)
    alone = answers(engine, records, 1)
    order = np.random.default_rng(0).permutation(len(records))
    shuffled = answers(engine, [records[i] for i in order], 32)
    ways = {f"in batches of {size}": answers(engine, records, size) for size in (7, 32, len(records))}
    ways["in batches of 32, in another order"] = [shuffled[i] for i in np.argsort(order)]
    ways["alone, on an index made one by one"] = answers(indexed(options.bundle, images, evaluation, 1), records, 1)
    rows, failed = [], False
    for name, found in ways.items():
        same, scores, weights = compare(alone, found)
        failed |= same < len(records)
        rows.append([name, f"{same} of {len(records)}", f"{scores:.1e}", f"{weights:.1e}"])
    print(report.table(["queries, against each alone", "same first ten", "largest difference of a score", "of a weight"], rows))
    if options.emulate:
        print(
            report.table(
                ["encoded under another processor", "largest difference", "least cosine"],
                emulated(options.bundle, images, records[:EMULATED], options.emulate),
            )
        )
    print(machine.describe(("onnxruntime",)))
    return int(failed)


def emulated(bundle: Path, images: Path, records: Sequence[TripletRecord], emulator: str) -> list[list[str]]:
    """The same images and queries encoded here and under `emulator`."""
    with TemporaryDirectory() as folder:
        found: list[dict[str, NDArray[np.float32]]] = []
        queries = Path(folder) / "queries.json"
        queries.write_text(json.dumps([[str((images / r.reference).resolve()), r.text] for r in records]))
        for number, command in enumerate(([], shlex.split(emulator))):
            path = Path(folder) / f"{number}.npz"
            subprocess.run([*command, sys.executable, "-m", "benchmarks.encoded", str(bundle), str(queries), str(path)], check=True)
            with np.load(path) as arrays:
                found.append(dict(arrays))
    rows = []
    for name, here in found[0].items():
        there = found[1][name]
        a, b = (array.astype(np.float64).reshape(-1, array.shape[-1]) for array in (here, there))
        cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        rows.append([name, f"{np.abs(here - there).max():.1e}", f"{cosines.min():.8f}"])
    return rows


if __name__ == "__main__":
    sys.exit(main())
