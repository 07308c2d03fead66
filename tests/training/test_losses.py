"""Each loss against a slow float64 reference written out in loops, and its limits; the sum of them is in `test_total_loss.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.loss_references import (
    cosines,
    reference_attribute_margin,
    reference_infonce,
    reference_kl,
    reference_presence,
    reference_ranking,
    reference_relevance,
    repeated_targets,
)
from support.tiny_training import make_model, query_inputs
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from dqe_training.config import LossConfig
from dqe_training.losses.attribute_margin import attribute_margin_loss
from dqe_training.losses.infonce import infonce_loss
from dqe_training.losses.kl_relevance import kl_relevance_loss, relevance_distribution, relevance_figures, same_target
from dqe_training.losses.presence import presence_loss
from dqe_training.losses.ranking import margin_ranking_loss, ranking_loss
from dqe_training.losses.total import BatchLabels, total_loss
from dqe_training.model import paired_score, score

BATCHES = (2, 3, 19)


# -- KL relevance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.49])
def test_relevance_and_kl_equal_the_reference(batch: int, share: float) -> None:
    similarity, scores = cosines(batch, batch), cosines(batch, batch, seed=1)
    ignore = same_target(repeated_targets(batch))
    relevance = relevance_distribution(similarity, share=share, temperature=0.05, ignore=ignore)
    expected = reference_relevance(similarity.numpy(), share, 0.05, ignore.numpy())
    np.testing.assert_allclose(relevance.numpy(), expected, rtol=1e-9, atol=1e-15)
    loss = kl_relevance_loss(scores, relevance, temperature=0.07, ignore=ignore)
    assert loss.item() == pytest.approx(reference_kl(scores.numpy(), expected, 0.07, ignore.numpy()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("batch", BATCHES)
def test_relevance_is_a_distribution_whose_mode_is_the_ground_truth(batch: int) -> None:
    worst = 1 - 2 * torch.eye(batch, dtype=torch.float64)  # every other target is as similar as can be, its own the opposite
    for similarity in (cosines(batch, batch), torch.ones(batch, batch, dtype=torch.float64), worst):
        for share in (0.0, 0.2, 0.499):
            ignore = same_target(repeated_targets(batch))
            relevance = relevance_distribution(similarity, share=share, temperature=0.05, ignore=ignore)
            torch.testing.assert_close(relevance.sum(dim=1), torch.ones(batch, dtype=torch.float64), rtol=0, atol=1e-12)
            assert (relevance[ignore] == 0).all()
            assert (relevance.argmax(dim=1) == torch.arange(batch)).all()
            assert (relevance.diagonal()[:, None] > relevance - 2 * torch.eye(batch)).all()


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_the_share_leaves_the_ground_truth(temperature: float) -> None:
    """P_ii is 1 - share, however sharp the softmax and however like itself a target is."""
    targets = F.normalize(torch.randn(19, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    ignore = same_target(repeated_targets(19))
    relevance = relevance_distribution(targets @ targets.T, share=0.2, temperature=temperature, ignore=ignore)
    torch.testing.assert_close(relevance.diagonal(), torch.full((19,), 0.8, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_row_with_no_other_target_keeps_everything() -> None:
    relevance = relevance_distribution(torch.ones(3, 3), share=0.3, temperature=0.05, ignore=same_target(torch.tensor([4, 4, 4])))
    torch.testing.assert_close(relevance, torch.eye(3))


def test_relevance_figures() -> None:
    relevance = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]])
    valid = torch.tensor([[True, True, False], [False, True, False], [True, True, True]])
    figures = relevance_figures(relevance, valid)
    assert figures["truth"].item() == pytest.approx((0.8 + 0.8 + 1) / 3)
    assert figures["valid"].item() == pytest.approx((0.75 + 0 + 0) / 3)
    entropy = -sum(p * math.log(p) for p in (0.8, 0.15, 0.05, 0.1, 0.8, 0.1)) / 3
    assert figures["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert "valid" not in relevance_figures(relevance, None)


def test_related_targets_get_more_mass() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    relevance = relevance_distribution(similarity, share=0.3, temperature=0.5, ignore=torch.zeros(3, 3, dtype=torch.bool))
    assert relevance[0, 1] > relevance[0, 2] > 0


def test_relevance_has_no_gradient() -> None:
    similarity = cosines(4, 4).requires_grad_()
    relevance = relevance_distribution(similarity, share=0.2, temperature=0.05, ignore=torch.zeros(4, 4, dtype=torch.bool))
    assert not relevance.requires_grad


def test_same_target_marks_the_others_alone() -> None:
    ids = torch.tensor([5, 7, 5, 5])
    expected = [[False, False, True, True], [False] * 4, [True, False, False, True], [True, False, True, False]]
    assert same_target(ids).tolist() == expected


@pytest.mark.parametrize("loss", ["kl", "infonce"])
def test_masked_entries_neither_count_nor_get_a_gradient(loss: str) -> None:
    ignore = same_target(repeated_targets(7))
    assert ignore.any()
    relevance = relevance_distribution(cosines(7, 7), share=0.3, temperature=0.05, ignore=ignore)

    def value(scores: Tensor) -> Tensor:
        if loss == "infonce":
            return infonce_loss(scores, temperature=0.07, ignore=ignore)
        return kl_relevance_loss(scores, relevance, temperature=0.07, ignore=ignore)

    scores = cosines(7, 7, seed=2).requires_grad_()
    before = value(scores)
    (gradient,) = torch.autograd.grad(before, scores)
    assert (gradient[ignore] == 0).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[~ignore] != 0).any()
    assert value(torch.where(ignore, 100.0, scores)).item() == before.item()


def test_a_share_of_zero_is_infonce() -> None:
    ignore = same_target(repeated_targets(6))
    scores = cosines(6, 6).requires_grad_()
    relevance = relevance_distribution(cosines(6, 6, seed=3), share=0.0, temperature=0.05, ignore=ignore)
    kl = kl_relevance_loss(scores, relevance, temperature=0.07, ignore=ignore)
    contrastive = infonce_loss(scores, temperature=0.07, ignore=ignore)
    assert kl.item() == pytest.approx(contrastive.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (kl, contrastive)), rtol=1e-9, atol=1e-12)


def test_kl_is_least_where_q_equals_p() -> None:
    ignore = torch.zeros(4, 4, dtype=torch.bool)
    relevance = relevance_distribution(cosines(4, 4), share=0.4, temperature=0.3, ignore=ignore)
    perfect = relevance.log() * 0.07
    assert kl_relevance_loss(perfect, relevance, temperature=0.07, ignore=ignore).item() == pytest.approx(0, abs=1e-12)
    assert kl_relevance_loss(perfect + 0.01 * cosines(4, 4, seed=9), relevance, temperature=0.07, ignore=ignore).item() > 1e-4


def test_a_batch_of_one_target_gives_zero_and_no_nan() -> None:
    ignore = same_target(torch.zeros(3, dtype=torch.int64))
    scores = cosines(3, 3).requires_grad_()
    relevance = relevance_distribution(cosines(3, 3), share=0.2, temperature=0.05, ignore=ignore)
    loss = infonce_loss(scores, temperature=0.07, ignore=ignore) + kl_relevance_loss(scores, relevance, temperature=0.07, ignore=ignore)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == 0
    assert (gradient == 0).all()


# -- the other parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, *BATCHES])
def test_infonce_equals_the_reference(batch: int) -> None:
    scores, ignore = cosines(batch, batch), same_target(repeated_targets(batch))
    expected = reference_infonce(scores.numpy(), 0.07, ignore.numpy())
    assert infonce_loss(scores, temperature=0.07, ignore=ignore).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("batch", [1, *BATCHES])
def test_ranking_equals_the_reference(batch: int) -> None:
    positive, negative = cosines(batch), cosines(batch, seed=1)
    for valid in (torch.ones(batch, dtype=torch.bool), torch.arange(batch) % 2 == 0, torch.zeros(batch, dtype=torch.bool)):
        expected = reference_ranking(positive.numpy(), negative.numpy(), valid.numpy(), 0.07)
        assert ranking_loss(positive, negative, valid, temperature=0.07).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_ranking_without_a_valid_row_is_zero_without_nan() -> None:
    positive, negative = cosines(4).requires_grad_(), cosines(4, seed=1).requires_grad_()
    loss = ranking_loss(positive, negative, torch.zeros(4, dtype=torch.bool), temperature=0.07)
    gradients = torch.autograd.grad(loss, (positive, negative))
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients)


def test_ranking_ignores_invalid_rows() -> None:
    valid = torch.tensor([True, False, True])
    negative = torch.tensor([0.1, 0.2, 0.3])
    positive = torch.tensor([0.5, 0.4, 0.3])
    changed = torch.tensor([0.1, 1e4, 0.3])
    assert ranking_loss(positive, negative, valid, temperature=0.1) == ranking_loss(positive, changed, valid, temperature=0.1)


def test_margin_ranking_equals_the_reference() -> None:
    positive, negative, valid = torch.tensor([0.5, 0.2, 0.9, 0.1]), torch.tensor([0.3, 0.4, 0.85, 0.9]), torch.tensor([1, 1, 1, 0]) > 0
    loss = margin_ranking_loss(positive, negative, valid, margin=0.1)
    assert loss.item() == pytest.approx((0 + 0.3 + 0.05) / 3)
    assert margin_ranking_loss(positive, negative, torch.zeros(4, dtype=torch.bool), margin=0.1).item() == 0


@pytest.mark.parametrize("batch", [1, *BATCHES])
@pytest.mark.parametrize("attributes", [1, 4])
def test_attribute_margin_equals_the_reference(batch: int, attributes: int) -> None:
    rng = np.random.default_rng(batch)
    for _ in range(5):
        sub_scores = cosines(batch, attributes, batch, seed=int(rng.integers(1000)))
        labels = rng.integers(-1, 3, (batch, attributes))
        named = rng.random((batch, attributes)) < 0.6
        loss = attribute_margin_loss(sub_scores, torch.from_numpy(labels), torch.from_numpy(named), margin=0.2)
        assert loss.item() == pytest.approx(reference_attribute_margin(sub_scores.numpy(), labels, named, 0.2), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([[1, 1], [1, 1], [1, 1]], True),  # nobody differs
        ([[-1, -1], [-1, -1], [-1, -1]], True),  # nothing is known
        ([[-1, 0], [2, -1], [-1, -1]], True),  # each is the only one known
        ([[0, 1], [1, 2], [2, 0]], False),  # nothing is named
    ],
)
def test_attribute_margin_without_a_pair_is_zero_without_nan(labels: list[list[int]], named: bool) -> None:
    sub_scores = cosines(3, 2, 3).requires_grad_()
    loss = attribute_margin_loss(sub_scores, torch.tensor(labels), torch.full((3, 2), named), margin=0.2)
    (gradient,) = torch.autograd.grad(loss, sub_scores)
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("batch", [1, *BATCHES])
def test_presence_equals_the_reference(batch: int) -> None:
    logits, named = 5 * cosines(batch, 3), cosines(batch, 3, seed=1) > 0
    assert presence_loss(logits, named).item() == pytest.approx(reference_presence(logits.numpy(), named.numpy()), rel=1e-9)


def test_gradients_are_the_derivatives() -> None:
    batch = 4
    ignore = same_target(torch.tensor([0, 1, 0, 2]))
    relevance = relevance_distribution(cosines(batch, batch), share=0.2, temperature=0.1, ignore=ignore)
    scores, positive, negative = (
        cosines(batch, batch).requires_grad_(),
        cosines(batch).requires_grad_(),
        cosines(batch, seed=3).requires_grad_(),
    )
    sub_scores, logits = cosines(batch, 2, batch, seed=4).requires_grad_(), cosines(batch, 2, seed=5).requires_grad_()
    labels, named = (
        torch.tensor([[0, 1], [1, 1], [2, -1], [0, 0]]),
        torch.tensor([[True, True], [True, False], [False, True], [True, True]]),
    )
    valid = torch.tensor([True, False, True, True])
    assert gradcheck(lambda s: kl_relevance_loss(s, relevance, temperature=0.3, ignore=ignore), (scores,))
    assert gradcheck(lambda s: infonce_loss(s, temperature=0.3, ignore=ignore), (scores,))
    assert gradcheck(lambda p, n: ranking_loss(p, n, valid, temperature=0.3), (positive, negative))
    assert gradcheck(lambda s: attribute_margin_loss(s, labels, named, margin=0.2), (sub_scores,))
    assert gradcheck(lambda z: presence_loss(z, named), (logits,))


# -- scores and the sum --------------------------------------------------------------------------------------------------


def test_scores_are_the_best_inner_product() -> None:
    queries, tokens = cosines(3, 5), cosines(4, 2, 5, seed=1)
    expected = np.array([[max(float(q @ t) for t in item) for item in tokens.numpy()] for q in queries.numpy()])
    np.testing.assert_allclose(score(queries, tokens).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(paired_score(queries, tokens[:3]).numpy(), expected.diagonal(), rtol=1e-12)


def test_every_part_reaches_the_parameters_it_should() -> None:
    model = make_model()
    tokens, ids, mask = query_inputs(model, 6, 5)
    output = model.encode_query(tokens, ids, mask)
    labels = BatchLabels(torch.arange(6), torch.arange(24).view(6, 4) % 3, torch.ones(6, 4, dtype=torch.bool))
    total, _ = total_loss(output, model.encode_targets(tokens), labels, LossConfig(), relevance_share=0.2)
    total.backward()
    vision = {name for name, _ in model.named_parameters() if name.startswith("vision_model.")}  # given tokens: not reached
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} - vision
    # softmax over tokens does not see a constant shift, so the key's bias cannot matter
    assert {name for name in without if "key.bias" not in name} == set()
