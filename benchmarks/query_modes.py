"""What a demo's model answers to an image alone and to a text alone, for which it was not trained, beside both together.

python -m benchmarks.query_modes demo                            # the folder of `make demo`
python -m benchmarks.query_modes demo --out query-modes.json    # and the same figures as JSON
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dqe_engine.doctor.machine import processor_name
from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query

ITEMS, TEXTS, K = 200, 300, 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="query_modes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    demo = options.demo
    shares_by_way: dict[str, dict[str, float]] = {}
    lines = (demo / "garments" / "images.jsonl").read_text().splitlines()
    attributes = {line["image"]: line["attributes"] for line in map(json.loads, lines) if line["image"].startswith("gallery/")}
    engine = RetrievalEngine.load(demo / "bundle")
    engine.load_index(demo / "index")
    names, rng = engine.bundle.vocabulary.names, np.random.default_rng(0)

    items = [engine.index.ids[n] for n in rng.choice(len(engine.index), ITEMS, replace=False)]
    others = [engine.index.ids[n] for n in rng.choice(len(engine.index), 20 * ITEMS)]
    ways = {
        "image alone": [engine.search(Query(reference_id=id, k=K)) for id in items],
        "image and 'similar'": [engine.search(Query(reference_id=id, text="similar", k=K)) for id in items],
    }
    print(f"of the first {K}, share with the item's own ({ITEMS} items)  " + "  ".join(f"{name:>8}" for name in names))
    for way, results in ways.items():
        shares = [
            np.mean(
                [attributes[hit.id][name] == attributes[id][name] for id, found in zip(items, results, strict=True) for hit in found.hits]
            )
            for name in names
        ]
        shares_by_way[way] = dict(zip(names, map(float, shares), strict=True))
        print(f"{way:52}  " + "  ".join(f"{share:8.2f}" for share in shares))
    chance = [np.mean([attributes[a][name] == attributes[b][name] for a in items for b in others]) for name in names]
    shares_by_way["chance"] = dict(zip(names, map(float, chance), strict=True))
    print(f"{'chance':52}  " + "  ".join(f"{share:8.2f}" for share in chance))

    records = [json.loads(line) for line in (demo / "garments" / "val.jsonl").read_text().splitlines()]
    asked = [record for record in records if record.get("allowed")][:TEXTS]

    def right(id: str, record: dict[str, dict[str, list[str]]]) -> bool:
        return all(attributes[id][name] in values for name, values in record["allowed"].items())

    texts_by_way = {}
    print(f"of the first {K}, share that shows all that the text names ({len(asked)} texts)")
    for way, queries in (
        ("text alone", [Query(text=record["text"], k=K) for record in asked]),
        ("image and text", [Query(reference_id=record["reference"], text=record["text"], k=K) for record in asked]),
    ):
        found = [right(hit.id, record) for record, result in zip(asked, engine.search_batch(queries), strict=True) for hit in result.hits]
        texts_by_way[way] = float(np.mean(found))
        print(f"{way:52}  {texts_by_way[way]:8.2f}")
    texts_by_way["chance"] = float(np.mean([right(id, record) for record in asked for id in others[:500]]))
    print(f"{'chance':52}  {texts_by_way['chance']:8.2f}")
    if options.out is not None:
        manifest = engine.bundle.manifest
        figures = {
            "what": f"shares of the first {K} hits; own: that have the item's own value; named: that show all that the text names",
            "gallery": len(engine.index), "items": ITEMS, "texts": len(asked), "precision": manifest.precision,
            "processor": processor_name(), "own": shares_by_way, "named": texts_by_way,
        }  # fmt: skip
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
