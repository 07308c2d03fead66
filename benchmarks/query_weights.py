"""What other attribute weights do to a demo's answers: multipliers of the predicted ones, and values in their place.

    python -m benchmarks.query_weights demo        # the folder of `make demo`

Test queries, over the demo's gallery. *Shown*: the share of the first ten that has a value which the text allows, of the attribute whose
weight is changed. *Kept*: the share that has the reference's values of all attributes that the text does not name. Differences to
multiplier 1 are paired by query, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query

from . import machine, report
from .sections import recorded

_ROOT = Path(__file__).parent
_PACKAGES = ("dqe-engine", "onnxruntime")
MULTIPLIERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
VALUES = (0.25, 0.5, 1.0)
"""That replace the weight of an attribute which the text does not name."""
K, BATCH = 10, 64
_Z = 1.96

Record = dict[str, Any]
Hits = list[list[str]]


class Asked:
    """The demo's engine, its test queries, and what the images show."""

    def __init__(self, demo: Path, most: int) -> None:
        lines = map(json.loads, (demo / "garments" / "images.jsonl").read_text().splitlines())
        self.shown = {line["image"]: line["attributes"] for line in lines if line["image"].startswith("gallery/")}
        records = map(json.loads, (demo / "garments" / "test.jsonl").read_text().splitlines())
        self.records: list[Record] = [record for record in records if record["attributes"]][:most]
        self.engine = RetrievalEngine.load(demo / "bundle")
        self.engine.load_index(demo / "index")

    def ask(self, records: Sequence[Record], **changes: Any) -> Hits:
        """Ids of the first ten of each, asked with these changes."""
        queries = [replace(Query(reference_id=record["reference"], text=record["text"], k=K), **changes) for record in records]
        parts = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
        return [[hit.id for hit in result.hits] for part in parts for result in self.engine.search_batch(part)]

    def found(self, records: Sequence[Record], hits: Hits) -> NDArray[np.float64]:
        """Whether the labelled target is among the first ten."""
        return np.array([record["target"] in ids for record, ids in zip(records, hits, strict=True)], np.float64)

    def share(self, records: Sequence[Record], hits: Hits, right: Callable[[Record, str], bool]) -> NDArray[np.float64]:
        return np.array([np.mean([right(record, id) for id in ids]) for record, ids in zip(records, hits, strict=True)])

    def shows(self, name: str, record: Record, id: str) -> bool:
        return self.shown[id][name] in record["allowed"][name]

    def keeps(self, names: Sequence[str], record: Record, id: str) -> bool:
        return all(self.shown[id][name] == self.shown[record["reference"]][name] for name in names if name not in record["attributes"])


def mean(values: NDArray[np.float64], base: NDArray[np.float64] | None = None) -> dict[str, float]:
    """In per cent; with `base`, the paired difference and half of its 95 % interval."""
    row = {"mean": 100 * float(values.mean())}
    if base is not None and values is not base:
        difference = 100 * (values - base)
        row |= {"difference": float(difference.mean()), "half": float(_Z * difference.std(ddof=1) / np.sqrt(len(values)))}
    return row


def named(asked: Asked, name: str, names: Sequence[str]) -> dict[str, Any]:
    """Multipliers of an attribute that the text names."""
    records = [record for record in asked.records if name in record["attributes"]]
    hits = {factor: asked.ask(records, weights={} if factor == 1 else {name: factor}) for factor in sorted(MULTIPLIERS)}
    judged: dict[str, Callable[[Sequence[Record], Hits], NDArray[np.float64]]] = {
        "shown": partial(asked.share, right=partial(asked.shows, name)),
        "kept": partial(asked.share, right=partial(asked.keeps, names)),
        "recall_at_10": asked.found,
    }
    rows: list[dict[str, Any]] = [{"multiplier": factor} for factor in MULTIPLIERS]
    for figure, judge in judged.items():
        base = judge(records, hits[1.0])
        for row, factor in zip(rows, MULTIPLIERS, strict=True):
            row[figure] = mean(base if factor == 1 else judge(records, hits[factor]), base)
    return {"attribute": name, "queries": len(records), "rows": rows}


def unnamed(asked: Asked, name: str) -> dict[str, Any]:
    """Weights of an attribute that the text does not name."""
    records = [record for record in asked.records if name not in record["attributes"]]
    plain = asked.ask(records)
    tripled = asked.ask(records, weights={name: 3.0})
    same = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(plain, tripled, strict=True)]))
    judge = partial(asked.share, records, right=lambda record, id: asked.shown[id][name] == asked.shown[record["reference"]][name])
    base = judge(hits=plain)
    rows: list[dict[str, Any]] = [{"value": None, "kept": mean(base)}]
    rows += [{"value": value, "kept": mean(judge(hits=asked.ask(records, absolute_weights={name: value})), base)} for value in VALUES]
    return {"attribute": name, "queries": len(records), "same_hits_at_3": same, "rows": rows}


def measure(demo: Path, most: int) -> dict[str, Any]:
    asked = Asked(demo, most)
    names = asked.engine.bundle.vocabulary.names
    predicted = {"named": [named(asked, name, names) for name in names], "unnamed": [unnamed(asked, name) for name in names]}
    return {"precision": asked.engine.bundle.manifest.precision, "items": len(asked.engine.index), "k": K, **predicted}


def markdown(section: dict[str, Any]) -> str:
    def cell(figure: dict[str, float]) -> str:
        beside = f" ({figure['difference']:+.1f} ± {figure['half']:.1f})" if "difference" in figure else ""
        return f"{figure['mean']:.1f}{beside}"

    parts = []
    for found in section["named"]:
        rows = [[f"× {row['multiplier']:g}", *(cell(row[figure]) for figure in ("shown", "kept", "recall_at_10"))] for row in found["rows"]]
        parts += [
            f"**{found['attribute']}**, {found['queries']} texts that name it",
            report.table(["weight", "shown, % of the first ten", "rest kept, %", "R@10"], rows),
        ]
    for found in section["unnamed"]:
        rows = [["as predicted" if row["value"] is None else f"{row['value']:g}", cell(row["kept"])] for row in found["rows"]]
        parts += [
            f"**{found['attribute']}**, {found['queries']} texts that do not name it; × 3 leaves {found['same_hits_at_3']:.1%} of the hits",
            report.table(["weight in place of the predicted", "of the first ten, % with the reference's value"], rows),
        ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="query_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--queries", type=int, default=1000, metavar="N", help="test queries, at most (default: 1000)")
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / machine.slug(), help="folder for results")
    options = parser.parse_args(arguments)
    if not (options.demo / "bundle" / "manifest.json").is_file():
        parser.exit(2, f"error: {options.demo}: no bundle there; run `make demo`\n")
    work = partial(measure, options.demo, options.queries)
    section = recorded(work, _PACKAGES, quick=False, threads=machine.cores())
    path = options.out / "query-weights.json"
    results = report.load(path, "query-weights")
    results["sections"]["weights"] = section
    report.save_json(path, results)
    print(markdown(section))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
