"""The recall benchmark's figures against cases worked out by hand, and its galleries, tables and curves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.retrieval import figures, galleries, plots, summary


def outcomes(
    ranked: list[list[int]], target: list[int], exact: list[list[int]], relevant: list[list[int]] | None = None
) -> figures.Outcomes:
    return figures.outcomes(np.array(ranked), np.array(target), np.array(exact), relevant)


def test_figures_by_hand() -> None:
    exact = [list(range(10)), list(range(10, 20))]
    ranked = [[3, 1, 2, 40, 41, 42, 43, 44, 45, 46, 47], [*range(10, 19), 99, 7]]
    found = outcomes(ranked, target=[2, 7], exact=exact, relevant=[[2, 3], [7, 99]])
    assert found.rank.tolist() == [3, 11]
    # Hits at ranks 1 and 3 of two valid ones; one at rank 10 of two, the other one beyond the cut.
    assert found.average_precision is not None
    assert found.average_precision.tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 10) / 2])
    assert figures.means(found) == pytest.approx(
        {"recall_at_1": 0, "recall_at_5": 0.5, "recall_at_10": 0.5, "recall_at_50": 1, "map_at_10": (5 / 6 + 1 / 20) / 2,
         "overlap_at_10": (0.3 + 0.9) / 2}
    )  # fmt: skip


def test_a_target_that_is_not_ranked_has_no_rank() -> None:
    found = outcomes([[1, 2, -1]], target=[3], exact=[[1, 2, 4]])
    assert found.rank.tolist() == [0]
    assert figures.means(found)["recall_at_50"] == 0
    assert "map_at_10" not in figures.means(found)


def test_overlap_counts_against_what_exact_search_could_find() -> None:
    """A gallery of three: padding is no item, in neither list."""
    assert outcomes([[1, -1, -1]], target=[1], exact=[[1, 2, -1]]).overlap.tolist() == [0.5]
    assert outcomes([[2, 1, -1]], target=[1], exact=[[1, 2, -1]]).overlap.tolist() == [1]


def test_a_record_is_read_back() -> None:
    found = outcomes([[3, 1], [5, 6]], [1, 0], [[3, 1], [6, 7]], [[1], [6]])
    again = figures.from_record(json.loads(json.dumps(figures.record(found)))["per_query"])
    assert figures.means(again) == figures.means(found)


def test_intervals_are_paired() -> None:
    """Two rankings that fail on the same queries differ by nothing for certain; unpaired intervals would be 8 points wide."""
    rng = np.random.default_rng(0)
    rank = rng.integers(0, 60, 400)
    same = figures.Outcomes(rank, np.ones(400), None)
    assert figures.differences(same, same)["recall_at_10"] == (0, 0, 0)
    better = figures.Outcomes(np.where(np.arange(400) < 20, 1, rank), np.ones(400), None)
    value, low, high = figures.differences(better, same)["recall_at_10"]
    assert 0 < low < value < high < 0.08


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        ours, other = (figures.Outcomes((rng.random(200) < share).astype(np.int64), np.ones(200), None) for share in (0.6, 0.5))
        _, low, high = figures.differences(ours, other)["recall_at_1"]
        held += low <= 0.1 <= high
    assert 88 <= held <= 100


def test_distractors_resemble_the_real_items_and_repeat(rng: np.random.Generator) -> None:
    real = galleries.unit(rng.standard_normal((40, 3, 16)).astype(np.float32))
    gallery = galleries.among_distractors(real, 300)
    assert gallery.items.shape == (300, 3, 16)
    np.testing.assert_array_equal(gallery.items[:40], real.astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(gallery.float32, axis=2), 1, atol=1e-3)
    nearest = np.einsum("nd,kd->nk", gallery.float32[40:, 0], real[:, 0]).max(axis=1)
    assert nearest.min() > 0.4  # random vectors of this width: some 0.5 at best, often far less
    assert nearest.mean() > 0.8
    np.testing.assert_array_equal(galleries.among_distractors(real, 300).items, gallery.items)
    assert galleries.among_distractors(real, 10).count == 40


def test_a_table_says_what_did_not_run() -> None:
    section = {
        "queries": 4, "gallery": 9, "quick": False, "threads": 2, "started": "now", "seconds": 1.0,
        "load_before": [0.0], "load_after": [0.0], "machine": {"cpu": "c", "commit": None, "dirty": False, "versions": {}},
        "rows": [{"name": "PyTorch float32", "status": "ok", "figures": {"recall_at_1": 0.5, "overlap_at_10": 1.0}},
                 {"name": "bundle int8", "status": "not exported: too far"},
                 {"name": "bundle f16", "status": "ok", "figures": {"recall_at_1": 0.25, "overlap_at_10": 0.9}, "graph_bytes": 2_500_000,
                  "difference": {"recall_at_1": (-0.25, -0.5, 0.0), "overlap_at_10": (-0.1, -0.2, 0.0)}}],
    }  # fmt: skip
    text = summary.markdown({"sections": {"precision": section}})
    assert "| bundle int8 | not exported: too far | – | – |" in text
    assert "| bundle f16 | 2.5 | 25.0 | 90.0 |" in text
    assert "| bundle f16 | -25.0 [-50.0, +0.0] |" in text


def test_curves_are_milliseconds_a_query_in_the_order_of_settings() -> None:
    def row(overlap: float, seconds: float) -> dict[str, object]:
        return {"method": "m", "figures": {"overlap_at_10": overlap}, "batches": {"64": {"median_s": seconds}}}

    rows = [row(0.5, 0.064), row(0.9, 0.032), {"method": "left out", "status": "no"}]
    assert plots.curves(rows, "64") == {"m": [(1.0, 0.5), (0.5, 0.9)]}
    assert plots.curves(rows, "1") == {}
