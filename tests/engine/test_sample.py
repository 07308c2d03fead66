"""The sample that ships with the package: small, whole, and worth looking at."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dqe_engine import sample
from dqe_engine.bundle import Bundle
from dqe_engine.contracts.manifest import REPORT_FILES, SCHEMA_VERSION
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.image_sources import find_images
from dqe_engine.index.metadata_file import read_metadata
from dqe_engine.query import Query

MOST_BYTES = 6_000_000


@pytest.fixture(scope="module")
def engine() -> Iterator[RetrievalEngine]:
    with RetrievalEngine.load(sample.bundle(), provider="cpu") as engine:
        engine.index_images(sample.photos(), metadata=read_metadata(sample.metadata()))
        yield engine


def test_it_is_small_enough_to_ship() -> None:
    files = [file for file in sample.bundle().parent.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


def test_its_bundle_is_of_the_present_schema_and_was_held_to_its_answers() -> None:
    manifest = Bundle.load(sample.bundle(), verify=True).manifest
    assert manifest.schema_version == SCHEMA_VERSION, "write the sample again: python -m dqe_export.demo.sample --help"
    assert manifest.target == "cpu"
    assert manifest.retrieval is not None
    assert not [name for name in REPORT_FILES if (sample.bundle() / name).exists()]


def test_every_photo_is_described_and_every_value_is_there() -> None:
    described = read_metadata(sample.metadata())
    assert set(described) == {id for id, _ in find_images(sample.photos()).pairs}
    items = [entry for entry in described.values() if entry is not None]
    assert len(items) == len(described)
    values = {a.name: set(a.values) for a in Bundle.load(sample.bundle()).vocabulary.attributes}
    for key, name in (("colour", "colour"), ("kind", "shape"), ("pattern", "pattern"), ("length", "length")):
        counts = Counter(item[key] for item in items)
        assert set(counts) == values[name]
        assert max(counts.values()) <= 1.2 * min(counts.values())  # no menu has an entry that is hardly there
    assert len({(item["colour"], item["kind"], item["pattern"]) for item in items}) == len(items)
    assert all(0 < item["price"] < 200 for item in items)


QUESTIONS = {
    "colour": {value: f"is {value}" for value in (
        "black", "white", "grey", "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown")},
    "pattern": {"plain": "is plain", "striped": "has stripes", "dotted": "has dots", "checked": "is checked", "zigzag": "has zigzags"},
    "kind": {value: f"is a {value}" for value in ("t-shirt", "tank top", "hoodie", "coat", "kimono", "poncho", "dress", "skirt")},
}  # fmt: skip


@pytest.mark.parametrize(("attribute", "least", "least_of_all"), [("colour", 0.4, 0.58), ("pattern", 0.7, 0.8), ("kind", 0.35, 0.52)])
def test_composed_queries_find_what_the_text_says(engine: RetrievalEngine, attribute: str, least: float, least_of_all: float) -> None:
    """Share of the first five hits that have what the text asks for, for a tenth of all photos that lack it as references.

    Five photos have a colour and the reference's kind, and all but one differ from it in the pattern, too, so all five cannot be had
    without giving something up. Measured: colour 0.51 to 0.76 by value, 0.64 over all; pattern 0.82 to 0.91 and 0.88; kind 0.45 to 0.78 and
    0.58; of any five photos, a twelfth, a fifth and a tenth have it. Float32 and
    float16 bundles are within 0.02 of this per value, so a tenth is left for other processors, and half of that for the mean.
    """
    shares = {}
    for value, text in QUESTIONS[attribute].items():
        items = read_metadata(sample.metadata())
        references = [id for id, entry in items.items() if entry is not None and entry[attribute] != value][::10]
        results = engine.search_batch([Query(reference_id=id, text=text, k=5) for id in references])
        found = [[hit.metadata is not None and hit.metadata[attribute] == value for hit in result.hits] for result in results]
        shares[value] = float(np.mean(found))
    assert min(shares.values()) >= least, shares
    assert np.mean(list(shares.values())) >= least_of_all, shares


def test_what_the_text_does_not_name_is_kept_better_than_by_chance(engine: RetrievalEngine) -> None:
    """ "is red" keeps the kind: measured, 0.49 of the first five, where a tenth of the photos are of a kind."""
    items = read_metadata(sample.metadata())
    kept = []
    for id, entry in list(items.items())[::10]:
        hits = engine.search(Query(reference_id=id, text="is red", k=5)).hits
        kept.append(np.mean([hit.metadata is not None and entry is not None and hit.metadata["kind"] == entry["kind"] for hit in hits]))
    assert np.mean(kept) >= 0.35


def test_filters_and_uploads_work(engine: RetrievalEngine) -> None:
    photo = next(sample.photos().glob("*.jpg"))
    hits = engine.search(Query(image=photo, text="is blue", k=8, filter={"kind": "coat", "price": {"<": 120}})).hits
    assert hits
    assert all(hit.metadata is not None and hit.metadata["kind"] == "coat" and hit.metadata["price"] < 120 for hit in hits)


def test_its_index_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = sample.index()
    assert place.parent == tmp_path / "dqe-engine" / "sample"
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sample.index() == tmp_path / "home" / ".cache" / "dqe-engine" / "sample" / place.name


def test_the_python_of_its_readme_runs() -> None:
    text = (sample.bundle().parent / "README.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], scope)
    assert scope["result"].hits


def test_an_installation_without_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(InputError, match="lacks the sample"):
        sample.bundle()


def test_the_import_is_cheap() -> None:
    program = "import sys, dqe_engine.sample\nassert not {'numpy', 'onnxruntime', 'PIL', 'msgspec'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_weight_trades_the_reference_against_what_the_text_names(engine: RetrievalEngine) -> None:
    """docs/queries.md says so, and that a value in place of a weight near 0 loosens an attribute."""
    described = read_metadata(sample.metadata())
    plain = [id for id, item in described.items() if item is not None and item["pattern"] == "plain"][:24]

    def share(key: str, values: list[str], **weights: Any) -> float:
        results = engine.search_batch([Query(reference_id=id, text="has stripes", k=10, **weights) for id in plain])
        shown = [(described[hit.id] or {})[key] == value for result, value in zip(results, values, strict=True) for hit in result.hits]
        return float(np.mean(shown))

    striped, own = ["striped"] * len(plain), [str((described[id] or {})["kind"]) for id in plain]
    shares = [share("pattern", striped, weights={"pattern": factor}) for factor in (0.0, 0.5, 1.0)]
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] > 0.3
    assert share("kind", own, weights={"shape": 3.0}) == pytest.approx(share("kind", own), abs=0.02)
    assert share("kind", own, absolute_weights={"shape": 1.0}) < share("kind", own) - 0.1
