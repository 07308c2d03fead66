"""A shop's nightly update: new and changed photos are embedded, prices are replaced, what is sold out leaves the index, all in one save.

python shop_nightly.py BUNDLE INDEX PHOTOS CATALOGUE.jsonl

The catalogue has a line for each article: {"id": "000123.jpg", "price": 39.9, "brand": "x", ...}. The id is the photo's name in its folder.
Servers that have the index open (`dqe-serve`) follow the save by themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dqe_engine import Query, RetrievalEngine, SearchResult
from dqe_engine.index.metadata_file import read_metadata
from dqe_engine.results import IndexingReport


def update(bundle: Path, index: Path, photos: Path, catalogue: Path) -> tuple[IndexingReport, int]:
    """What became of each article that is listed, and how many were removed because they no longer are."""
    listed = read_metadata(catalogue)
    with RetrievalEngine.load(bundle) as engine:
        if index.exists():
            engine.load_index(index)
        images = {id: photos / id for id in listed}
        report = engine.index_images(images, metadata=listed, on_error="skip")
        gone = [id for id in engine.index.ids if id not in listed]
        engine.index.remove(gone)
        engine.save_index(index)
    return report, len(gone)


def cheaper(engine: RetrievalEngine, article: str, text: str, *, below: float) -> SearchResult:
    """Articles like this one that differ as the text says and cost less: the filter is applied before anything is scored."""
    return engine.search(Query(reference_id=article, text=text, filter={"price": {"<": below}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("bundle", "index", "photos", "catalogue"):
        parser.add_argument(name, type=Path)
    report, removed = update(**vars(parser.parse_args()))
    print(f"{report.describe()}; {removed} sold out and removed")


if __name__ == "__main__":
    main()
