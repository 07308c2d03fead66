"""Search a folder of photos: index it, or bring its index up to date, then ask for a photo like one of them that differs as a text says.

python photo_folder.py BUNDLE PHOTOS INDEX REFERENCE "is red and has stripes"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dqe_engine import Query, RetrievalEngine, SearchResult


def search_folder(bundle: Path, photos: Path, index: Path, reference: Path, text: str, *, k: int = 5) -> SearchResult:
    """The k best photos of the folder. The index is kept in `index`, so that the next call embeds new and changed photos alone."""
    with RetrievalEngine.load(bundle) as engine:
        if index.exists():
            engine.load_index(index)
        report = engine.index_images(photos, on_error="skip")  # a damaged photo is told below, and the others are indexed
        print(report.describe())
        engine.save_index(index)
        return engine.search(Query(image=reference, text=text, k=k))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("bundle", "photos", "index", "reference"):
        parser.add_argument(name, type=Path)
    parser.add_argument("text")
    result = search_folder(**vars(parser.parse_args()))
    for hit in result.hits:
        print(f"{hit.score:.3f}  {hit.id}")


if __name__ == "__main__":
    main()
