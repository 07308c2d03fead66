"""The figures of dqe-reproduce, without a model: sums over queries, and the published rows that stand beside them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dqe_export.reproduce.figures import difference, measures_of, rows_of, summarise
from dqe_export.reproduce.published import ROWS, SOURCES
from dqe_training.data.queries import QuerySet
from dqe_training.evaluation.benchmarks import summary
from dqe_training.evaluation.metrics import PerQuery

DOCS = Path(__file__).parents[2] / "docs"


def test_columns_are_sums_over_queries(rng: np.random.Generator) -> None:
    """Random hits: the values are the protocol's, the interval is as wide as their spread says, and a row minus itself is nothing."""
    queries = [QuerySet(c, (), ("a",)) for c in ("dress", "shirt", "toptee")]
    hits = {q.name: rng.random((n, 2)) < 0.4 for q, n in zip(queries, (40, 60, 80), strict=True)}
    by_set = {name: {"recall_at_10": PerQuery.of(h[:, 0]), "recall_at_50": PerQuery.of(h[:, 1])} for name, h in hits.items()}
    measures = measures_of("fashioniq")
    rows = rows_of(measures, by_set)
    found = summarise(measures, rows)
    values = [{name: figure.value for name, figure in figures.items()} for figures in by_set.values()]
    assert found["mean"].value == pytest.approx(summary("fashioniq", values)["mean"])
    spread = sum(part[:, -1].var() / len(part) for part in rows.values()) ** 0.5
    low, high = found["mean"].interval
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    nothing = summarise(measures, difference(rows, rows))
    assert {(f.value, f.interval) for f in nothing.values()} == {(0.0, (0.0, 0.0))}


@pytest.mark.parametrize("dataset", list(ROWS))
def test_published_rows_are_the_pages(dataset: str) -> None:
    """docs/benchmarks.md says the same, figure by figure, and cites the same papers."""
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for row in ROWS[dataset]:
        numbers = {"fashioniq": "FashionIQ", "cirr": "CIRR", "circo": "CIRCO"}[dataset]
        section = re.search(rf"^## {numbers}.*?(?=^## )", page, re.MULTILINE | re.DOTALL)
        assert section is not None
        (line,) = [line for line in section[0].splitlines() if line.startswith(f"| {row.cited} |")]
        cells = line.split("|", 2)[2].split("(")[0]
        assert [float(found) for found in re.findall(r"\d+\.\d+", cells)] == list(row.figures)
        assert f"{row.source}. {SOURCES[row.source]}" in page
