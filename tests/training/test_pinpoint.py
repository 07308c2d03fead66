"""PinPoint: its files as the authors' repository has them, and its figures as their script computes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support.tiny_benchmarks import write_pinpoint
from support.tiny_training import write_checkpoint

from dqe_engine.errors import InputError
from dqe_training.cli import data, evaluate
from dqe_training.data.public.base import Options
from dqe_training.data.public.detect import open_benchmark
from dqe_training.data.public.pinpoint import PinPoint
from dqe_training.evaluation.benchmarks import pinpoint_figures

COLUMNS = {"query_id": "q", "query_image_signature": "a", "instruction": "red", "positive_candidates": ["b"]}


def authors_figures(retrieved: list[str], positives: list[str], negatives: list[str]) -> dict[str, float]:
    """The formulas of the authors' `utils/metrics.py`, written out: lists count what they hold twice."""
    out = {}
    for name, items in (("map", retrieved), ("without", [item for item in retrieved if item not in negatives])):
        for k in (1, 5, 10, 50):
            hits, total = 0, 0.0
            for at, item in enumerate(items[:k], start=1):
                if item in positives:
                    hits += 1
                    total += hits / at
            out[f"{name}_at_{k}"] = total / min(len(positives), k)
    out |= {f"negative_recall_at_{k}": sum(i in negatives for i in retrieved[:k]) / min(len(negatives), k) for k in (1, 5, 10, 50)}
    return out | {"precision_at_10": sum(item in positives for item in retrieved[:10]) / 10}


def test_the_files(tmp_path: Path) -> None:
    benchmark = open_benchmark(write_pinpoint(tmp_path, images=False))
    assert isinstance(benchmark, PinPoint)
    (queries,) = benchmark.query_sets("all", Options(), None)
    assert len(queries) == 9  # the one with two reference images is left out
    assert len(queries.gallery) == 40
    assert list(queries.gallery) == sorted(queries.gallery)
    first = queries.queries[0]
    assert (first.id, first.reference, first.text) == ("query_00000", queries.gallery[0], "is red")
    assert len(first.targets) == 4
    assert len(first.negatives) == 5
    assert first.negatives[-1] not in queries.position
    assert first.exclude == ()


def test_figures_are_the_authors(tmp_path: Path) -> None:
    (queries,) = PinPoint(write_pinpoint(tmp_path, images=False)).query_sets("all", Options(), None)
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(40) for _ in range(9)])
    ranked = np.concatenate([ranked, np.full((9, 10), -1)], axis=1)
    found = pinpoint_figures(queries, ranked)
    expected = [
        authors_figures([queries.gallery[at] for at in row if at >= 0], list(query.targets), list(query.negatives))
        for row, query in zip(ranked, queries.queries, strict=True)
    ]
    for name in (*(f"map_at_{k}" for k in (1, 5, 10, 50)), *(f"negative_recall_at_{k}" for k in (1, 5, 10, 50)), "precision_at_10"):
        assert found[name].numerator == pytest.approx([row[name] for row in expected]), name
    assert found["map_at_10_without_negatives"].value == pytest.approx(np.mean([row["without_at_10"] for row in expected]))
    precision = np.asarray([row["precision_at_10"] for row in expected]).reshape(3, 3)  # three texts of each image
    assert found["range_of_precision_at_10"].value == pytest.approx(np.ptp(precision, axis=1).mean())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = write_checkpoint(tmp_path / "model"), write_pinpoint(tmp_path / "pinpoint")
    assert evaluate.main([str(model), "--data", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dataset"] == "pinpoint"
    assert {"map_at_10", "negative_recall_at_10", "range_of_precision_at_10"} <= report["sets"][0]["figures"].keys()
    assert data.main(["check", str(folder)]) == 0
    assert "pinpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not in the official format"),
        (b"garbage" * 50, "not in the official format"),
        (
            {name: [value] for name, value in COLUMNS.items() if name != "positive_candidates"},
            "missing required field `positive_candidates`",
        ),
        (
            {name: [value] for name, value in COLUMNS.items()} | {"instruction": [5]},
            r"Expected `str`, got `int` - at `\$\[0\].instruction`",
        ),
    ],
)
def test_broken_files(content: bytes | dict, said: str, tmp_path: Path) -> None:
    write_pinpoint(tmp_path, images=False)
    path = tmp_path / "pinpoint_licensed.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        parquet.write_table(pyarrow.table(content), path)
    with pytest.raises(InputError, match=said) as raised:
        PinPoint(tmp_path).query_sets("all", Options())
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_gallery_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    write_pinpoint(tmp_path, images=False)
    (tmp_path / "index_signatures.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8 text; expected an image's signature a line"):
        PinPoint(tmp_path).query_sets("all", Options())
    (tmp_path / "index_signatures.txt").unlink()
    with pytest.raises(InputError, match=r"index_signatures\.txt: no such annotation file"):
        PinPoint(tmp_path).query_sets("all", Options())


def test_it_is_for_evaluation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="PinPoint is for evaluation"):
        PinPoint(write_pinpoint(tmp_path, images=False)).training_records()
