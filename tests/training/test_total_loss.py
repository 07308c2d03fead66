"""The sum of the losses, against that of the references: its weights, its switches, and where gradients flow."""

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
from torch import Tensor
from torch.nn import functional as F

from dqe_training.config import LossConfig
from dqe_training.losses.kl_relevance import kl_relevance_loss, relevance_distribution, same_target
from dqe_training.losses.total import BatchLabels, total_loss
from dqe_training.model import QueryOutput, paired_score, score


def batch_of(size: int = 6) -> tuple[QueryOutput, Tensor, Tensor, BatchLabels]:
    """Outputs of a batch in float64, with gradients: 3 tokens, 2 attributes, D = 8."""
    unit = {
        name: F.normalize(cosines(*shape, seed=seed), dim=-1).requires_grad_()
        for seed, (name, shape) in enumerate(
            {"query": (size, 8), "base": (size, 8), "sub": (size, 2, 8), "target": (size, 3, 8), "negative": (size, 3, 8)}.items()
        )
    }
    output = QueryOutput(unit["query"], unit["base"], unit["sub"], cosines(size, 2).abs(), cosines(size, 2, seed=8).requires_grad_())
    rng = np.random.default_rng(0)
    labels = BatchLabels(
        repeated_targets(size), torch.from_numpy(rng.integers(-1, 3, (size, 2))), torch.from_numpy(rng.random((size, 2)) < 0.7)
    )
    return output, unit["target"], unit["negative"], labels


def reference_parts(config: LossConfig, share: float, valid: np.ndarray | None) -> dict[str, float]:
    output, target, negative, labels = batch_of()
    query, sub, targets, negatives = (t.detach().numpy() for t in (output.query, output.sub_queries, target, negative))
    ids = labels.target_ids.numpy()
    batch = len(query)
    ignore = (ids[:, None] == ids[None, :]) & ~np.eye(batch, dtype=bool)
    scores = np.array([[max(q @ t for t in item) for item in targets] for q in query])
    pooled = np.array([item.mean(0) / np.linalg.norm(item.mean(0)) for item in targets])
    sub_scores = np.array([[[max(s @ t for t in item) for item in targets] for s in row] for row in sub])
    relevance = reference_relevance(pooled @ pooled.T, share, config.relevance_temperature, ignore)
    parts = {
        "kl": reference_kl(scores, relevance, config.temperature, ignore)
        if share
        else reference_infonce(scores, config.temperature, ignore),
        "infonce": reference_infonce(scores, config.temperature, ignore),
        "attribute": reference_attribute_margin(sub_scores, labels.labels.numpy(), labels.named.numpy(), config.attribute_margin),
        "presence": reference_presence(output.presence.detach().numpy(), labels.named.numpy()),
    }
    if valid is not None:
        lost = np.array([max(q @ t for t in item) for q, item in zip(query, negatives, strict=True)])
        parts["rank"] = reference_ranking(scores.diagonal(), lost, valid, config.temperature)
    return parts


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("objective", ["kl", "infonce"])
def test_the_total_is_the_weighted_sum_of_the_references(objective: str, share: float) -> None:
    config = LossConfig(objective=objective, rank_weight=0.7, attribute_weight=0.3, presence_weight=0.9)
    valid = np.array([True, False, True, True, False, True])
    expected = reference_parts(config, share, valid)
    output, target, negative, labels = batch_of()
    total, parts = total_loss(output, target, labels, config, relevance_share=share, negatives=(negative, torch.from_numpy(valid)))
    figures = {name for name in parts if name.startswith("relevance/")}
    assert figures == ({"relevance/truth", "relevance/entropy"} if objective == "kl" and share else set())
    parts = {name: value for name, value in parts.items() if name not in figures}
    assert set(parts) == {objective, "rank", "attribute", "presence", "total"}
    for name, value in parts.items():
        if name != "total":
            assert value.item() == pytest.approx(expected[name], rel=1e-9), name
        assert not value.requires_grad
    wanted = expected[objective] + 0.7 * expected["rank"] + 0.3 * expected["attribute"] + 0.9 * expected["presence"]
    assert total.item() == parts["total"].item() == pytest.approx(wanted, rel=1e-9)


def test_the_share_may_be_spread_evenly() -> None:
    """`relevance_spread: uniform` against the reference under similarities that are all alike; the targets themselves are not."""
    output, target, _, labels = batch_of()
    config = LossConfig(relevance_spread="uniform", relevance_temperature=0.05, attribute_weight=0, presence_weight=0)
    _, parts = total_loss(output, target, labels, config, relevance_share=0.3)
    ignore = same_target(labels.target_ids).numpy()
    relevance = reference_relevance(np.zeros((6, 6)), 0.3, 1.0, ignore)
    scores = score(output.query, target).detach().numpy()
    assert parts["kl"].item() == pytest.approx(reference_kl(scores, relevance, config.temperature, ignore), rel=1e-9)
    others = [(~ignore[i]).sum() - 1 for i in range(6)]
    evenly = -np.mean([0.7 * math.log(0.7) + 0.3 * math.log(0.3 / n) for n in others])
    assert parts["relevance/entropy"].item() == pytest.approx(evenly, rel=1e-9)


def test_the_ranking_loss_may_have_a_margin_and_the_temperature_may_be_given() -> None:
    output, target, negative, labels = batch_of()
    negatives = (negative, torch.ones(6, dtype=torch.bool))
    config = LossConfig(objective="infonce", ranking="margin", rank_margin=0.3)
    _, parts = total_loss(output, target, labels, config, relevance_share=0.0, negatives=negatives)
    positive, lost = score(output.query, target).diagonal(), paired_score(output.query, negative)
    assert parts["rank"].item() == pytest.approx((0.3 - positive + lost).clamp_min(0).mean().item(), rel=1e-9)
    warm = LossConfig(objective="infonce", temperature=0.2)
    wanted, _ = total_loss(output, target, labels, warm, relevance_share=0.0, negatives=negatives)
    given, _ = total_loss(
        output, target, labels, LossConfig(objective="infonce"), relevance_share=0.0, temperature=0.2, negatives=negatives
    )
    assert given.item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize(("off", "part"), [("rank_weight", "rank"), ("attribute_weight", "attribute"), ("presence_weight", "presence")])
def test_a_weight_of_zero_switches_its_part_off(off: str, part: str) -> None:
    weights = {"rank_weight": 1.0, "attribute_weight": 1.0, "presence_weight": 1.0}
    output, target, negative, labels = batch_of()
    options = {"relevance_share": 0.2, "negatives": (negative, torch.ones(6, dtype=torch.bool))}
    full, parts = total_loss(output, target, labels, LossConfig(**weights), **options)
    less, fewer = total_loss(output, target, labels, LossConfig(**weights | {off: 0.0}), **options)
    assert set(parts) - set(fewer) == {part}
    assert (full - less).item() == pytest.approx(parts[part].item(), rel=1e-9)


def test_no_negatives_no_ranking_part() -> None:
    output, target, _, labels = batch_of()
    _, parts = total_loss(output, target, labels, LossConfig(), relevance_share=0.2)
    assert "rank" not in parts


def test_no_gradient_flows_through_the_relevance_distribution() -> None:
    """Of the KL loss, target tokens get the gradient that they get through the scores, and no other."""
    config = LossConfig(rank_weight=0, attribute_weight=0, presence_weight=0)
    output, target, _, labels = batch_of()
    total, _ = total_loss(output, target, labels, config, relevance_share=0.3)
    pooled = F.normalize(target.detach().mean(dim=1), dim=-1)
    ignore = same_target(labels.target_ids)
    constant = relevance_distribution(pooled @ pooled.T, share=0.3, temperature=config.relevance_temperature, ignore=ignore)
    through_scores = kl_relevance_loss(score(output.query, target), constant, temperature=config.temperature, ignore=ignore)
    torch.testing.assert_close(*(torch.autograd.grad(x, target)[0] for x in (total, through_scores)), rtol=1e-10, atol=1e-14)
