"""Relevance suppression and semantic confusion: by hand, by brute force, and what they say of models whose fault is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dqe_training.evaluation.failures import relevance_suppression, score_rows, semantic_confusion

SCORES = np.asarray([[0.9, 0.1, 0.8, 0.7, 0.6, 0.5], [0.1, 0.9, 0.2, 0.3, 0.4, 0.5]], np.float32)


def test_suppression_by_hand() -> None:
    # Query 0: its reference 0 is left out; order 2, 3, 4, 5, 1. Query 1: order 1, 5, 4, 3, 2, 0.
    found = relevance_suppression(SCORES, np.asarray([2, 5]), [[2, 3, 5], [5]], excluded=[[0], []])
    assert found.target_rank.numerator[0] == 1
    assert found.unlabelled_rank.numerator[0] == 3  # the mean of ranks 2 and 4
    assert found.target_ahead.numerator[0] == 1
    assert found.score_gap.numerator[0] == pytest.approx(0.8 - (0.7 + 0.5) / 2)
    assert found.median_ranks == (1, 2)  # the lower of two
    # Query 1 has no unlabelled valid image, and counts in the last two figures alone.
    assert [figure.queries for figure in (found.target_rank, found.unlabelled_rank, found.score_gap)] == [1, 1, 1]
    assert found.valid_above_wrong.numerator == pytest.approx([2 / 3, 0])  # 4 is wrong and third; 1 is wrong and first
    assert found.average_precision.numerator == pytest.approx([(1 + 1 + 3 / 4) / 3, 1 / 2])


def test_suppression_where_nothing_is_valid_or_everything() -> None:
    nothing = relevance_suppression(SCORES, np.asarray([2, 5]), [[], []])
    assert all(figure.queries == 0 for name, figure in vars(nothing).items() if name != "median_ranks")
    assert all(math.isnan(rank) for rank in nothing.median_ranks)
    everything = relevance_suppression(SCORES, np.asarray([2, 5]), [range(6), range(6)])
    assert everything.valid_above_wrong.value == everything.average_precision.value == 1


def test_the_target_is_valid_whether_it_is_listed_or_not() -> None:
    scores = np.asarray([[3.0, 2.0, 1.0, 0.0]], np.float32)
    listed, unlisted = (relevance_suppression(scores, np.asarray([0]), [valid]) for valid in ([0, 1], [1]))
    for found in (listed, unlisted):
        assert found.valid_above_wrong.value == found.average_precision.value == 1


def test_equal_scores_rank_by_position() -> None:
    found = relevance_suppression(np.zeros((1, 4), np.float32), np.asarray([3]), [[1, 3]])
    assert (found.target_rank.value, found.unlabelled_rank.value, found.score_gap.value) == (4, 2, 0)


def test_a_model_that_lifts_the_label_alone_is_seen_and_one_that_lifts_all_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 100)).astype(np.float32)
    relevant = [rng.choice(100, 8, replace=False).tolist() for _ in range(60)]
    target = np.asarray([answers[0] for answers in relevant])
    suppressing, fair = noise.copy(), noise.copy()
    for row, answers in enumerate(relevant):
        suppressing[row, answers[0]] += 5
        fair[row, answers] += 5
    bad, good = (relevance_suppression(scores, target, relevant) for scores in (suppressing, fair))
    assert bad.score_gap.interval()[0] > 3
    assert good.score_gap.interval()[0] < 0 < good.score_gap.interval()[1]
    assert bad.median_ranks[0] == 1
    assert bad.median_ranks[1] > 30
    assert good.average_precision.value > 0.9 > 0.4 > bad.average_precision.value
    assert good.valid_above_wrong.value > 0.8 > 0.3 > bad.valid_above_wrong.value


def test_a_label_that_nothing_sets_apart_shows_no_suppression() -> None:
    """Any model, targets drawn evenly from unequally many valid images, ranks skewed: all of the label's figures are level."""
    rng = np.random.default_rng(2)
    relevant = [rng.choice(200, int(rng.integers(2, 20)), replace=False).tolist() for _ in range(1500)]
    scores = rng.gamma(0.3, size=(1500, 200)).astype(np.float32)
    for row, answers in enumerate(relevant):
        scores[row, answers] += rng.gamma(0.5, size=len(answers))
    target = np.asarray([answers[int(rng.integers(len(answers)))] for answers in relevant])
    found = relevance_suppression(scores, target, relevant)
    for figure, level in ((found.target_ahead, 0.5), (found.score_gap, 0.0)):
        low, high = figure.interval(level=0.999)
        assert low < level < high
    assert found.target_rank.value == pytest.approx(found.unlabelled_rank.value, rel=0.1)
    assert found.median_ranks[0] == pytest.approx(found.median_ranks[1], rel=0.1)


@pytest.mark.parametrize("items", [1, 19, 111])
def test_scores_are_maxsim(items: int) -> None:
    rng = np.random.default_rng(items)
    queries, tokens = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(items, 3, 8)).astype(np.float32)
    expected = np.einsum("qd,gmd->qgm", queries, tokens).max(axis=2)
    np.testing.assert_allclose(np.stack(list(score_rows(queries, tokens))), expected, rtol=0, atol=1e-5)


def request(images: int = 6, texts: int = 5) -> tuple[np.ndarray, list[str]]:
    """Every text of every image."""
    return np.repeat(np.arange(images), texts), [f"text {t}" for t in range(texts)] * images


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("deaf", ["to the text", "to the image", "to neither"])
def test_confusion_tells_which_half_is_not_heard(deaf: str) -> None:
    rng = np.random.default_rng(1)
    reference, texts = request()
    of_image, of_text = rng.normal(size=(6, 32))[reference], rng.normal(size=(5, 32))[[int(t[-1]) for t in texts]]
    queries = unit({"to the text": of_image, "to the image": of_text, "to neither": rng.normal(size=(30, 32))}[deaf])
    ranked = np.argsort(-queries @ unit(rng.normal(size=(400, 32))).T, axis=1, kind="stable")[:, :50]
    found = semantic_confusion(queries, ranked, reference, texts)
    by_reference, by_text, unrelated = found.same_reference_overlap.value, found.same_text_overlap.value, found.unrelated_overlap.value
    assert (by_reference == 1) is (deaf == "to the text")
    assert (by_text == 1) is (deaf == "to the image")
    assert unrelated < 0.3
    assert (found.same_reference_cosine.value > 0.999) is (deaf == "to the text")
    assert (found.same_text_cosine.value > 0.999) is (deaf == "to the image")


def test_confusion_by_hand() -> None:
    queries = np.asarray([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    ranked = np.asarray([[0, 1, 2], [2, 1, 9], [5, 6, -1]])
    found = semantic_confusion(queries, ranked, np.asarray([7, 7, 8]), ["red", "blue", "red"], depth=3)
    assert found.same_reference_overlap.numerator == pytest.approx([2 / 4, 2 / 4, 0])
    assert found.same_reference_overlap.queries == 2
    assert found.same_text_cosine.numerator == pytest.approx([0.6, 0, 0.6])
    assert found.same_text_overlap.value == 0
    assert found.unrelated_cosine.numerator == pytest.approx([0, 0.8, 0.8])


def test_pairs_that_share_an_answer_are_no_confusion() -> None:
    queries = np.eye(3, dtype=np.float32)
    ranked = np.zeros((3, 1), np.int64)
    found = semantic_confusion(queries, ranked, np.zeros(3, np.int64), ["a", "b", "c"], relevant=[[1, 2], [2], [3]])
    assert found.same_reference_overlap.denominator.tolist() == [1, 1, 1]  # a and b are no pair, both with c are
    alone = semantic_confusion(queries[:2], ranked[:2], np.zeros(2, np.int64), ["a", "b"], relevant=[[1, 2], [2]])
    assert alone.same_reference_overlap.queries == 0
    assert math.isnan(alone.same_reference_overlap.value)
