"""SPRC's and QuRe's losses and GISTEmbed's filter: against slow float64 references in loops, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.slow_qformer import slow_qformer
from support.tiny_training import make_model, model_config, query_inputs
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from dqe_training.config import LossConfig
from dqe_training.losses.alignment import alignment_loss
from dqe_training.losses.margin_filter import MarginStrategy, suspected_positives
from dqe_training.losses.total import BatchLabels, Prompted, total_loss
from dqe_training.model import DQEModel, QueryOutput, paired_score, score
from dqe_training.model.prompts import PromptTokens
from dqe_training.trns.drawing import draw_random

STRATEGIES: tuple[MarginStrategy, ...] = ("absolute", "relative")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


# -- alignment ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 19])
def test_alignment_equals_the_reference(batch: int) -> None:
    fused, prompts = values(batch, 5), values(3, 5, seed=1)
    squares = [(fused[i, h].item() - sum(prompts[q, h].item() for q in range(3)) / 3) ** 2 for i in range(batch) for h in range(5)]
    assert alignment_loss(fused, prompts).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_alignment_moves_the_fused_tokens_alone() -> None:
    fused, prompts = values(4, 5).requires_grad_(), values(3, 5, seed=1).requires_grad_()
    assert gradcheck(lambda x: alignment_loss(x, prompts), (fused,))
    assert torch.autograd.grad(alignment_loss(fused, prompts), prompts, allow_unused=True) == (None,)
    assert alignment_loss(prompts.mean(dim=0).expand(4, -1), prompts).item() == 0


# -- the margin filter ----------------------------------------------------------------------------------------------------


def slow_filter(guide: np.ndarray, strategy: str, margin: float) -> np.ndarray:
    found = np.zeros(guide.shape, bool)
    for i in range(len(guide)):
        limit = guide[i, i] - margin if strategy == "absolute" else guide[i, i] * (1 - margin)
        for j in range(len(guide)):
            found[i, j] = j != i and guide[i, j] > limit
    return found


@pytest.mark.parametrize("batch", [1, 2, 19])
@pytest.mark.parametrize("margin", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_filter_equals_the_reference(strategy: MarginStrategy, margin: float, batch: int) -> None:
    guide = values(batch, batch).requires_grad_()  # some of the targets' scores are negative
    found = suspected_positives(guide, strategy=strategy, margin=margin)
    assert found.tolist() == slow_filter(guide.detach().numpy(), strategy, margin).tolist()
    assert not found.diagonal().any()


def test_what_equals_the_threshold_stays_a_negative() -> None:
    guide = torch.tensor([[0.5, 0.25, 0.251], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    assert suspected_positives(guide, strategy="absolute", margin=0.25).tolist() == [[False, False, True], [False] * 3, [True, True, False]]
    assert suspected_positives(guide, strategy="relative", margin=0.5).tolist() == [[False, False, True], [False] * 3, [False] * 3]


# -- in the sum -----------------------------------------------------------------------------------------------------------

IDS = (0, 1, 0, 2, 3, 4)
"""Rows 0 and 2 share their target image."""


def batch_of() -> tuple[QueryOutput, Tensor, BatchLabels]:
    query, target = (F.normalize(values(*shape, seed=3), dim=-1).requires_grad_() for shape in ((6, 8), (6, 3, 8)))
    nothing = query.new_zeros(6, 0)
    labels = BatchLabels(torch.tensor(IDS), torch.zeros(6, 0, dtype=torch.int64), torch.zeros(6, 0, dtype=torch.bool))
    return QueryOutput(query, query, query.new_zeros(6, 0, 8), nothing, nothing), target, labels


def slow_contrast(scores: np.ndarray, dropped: np.ndarray, temperature: float) -> float:
    total = 0.0
    for i in range(len(scores)):
        kept = [j for j in range(len(scores)) if j == i or (IDS[j] != IDS[i] and not dropped[i, j])]
        total += math.log(sum(math.exp(scores[i, j] / temperature) for j in kept)) - scores[i, i] / temperature
    return total / len(scores)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_filtered_negatives_have_no_part(strategy: MarginStrategy, guided: bool) -> None:
    output, target, labels = batch_of()
    config = LossConfig(objective="infonce", rank_weight=0, filter=strategy, filter_margin=0.1)
    guide = values(6, 6, seed=9) if guided else None
    total, parts = total_loss(output, target, labels, config, relevance_share=0.0, guide=guide)
    scores = score(output.query, target).detach().numpy()
    dropped = slow_filter(scores if guide is None else guide.numpy(), strategy, 0.1)
    assert total.item() == pytest.approx(slow_contrast(scores, dropped, 0.07), rel=1e-9)
    others = [(i, j) for i in range(6) for j in range(6) if IDS[i] != IDS[j]]
    share = sum(dropped[i, j] for i, j in others) / len(others)
    assert 0 < share < 1
    assert parts["filter/dropped"].item() == pytest.approx(share)


def test_its_own_guide_forgives_a_model_what_it_ranks_above_the_target() -> None:
    """A row whose target scores below all others gets no gradient under its own guide, and one under another's."""
    output, target, labels = batch_of()
    query = output.query.detach().clone()
    query[3] = -target[3].detach().mean(dim=0)
    query = F.normalize(query, dim=-1).requires_grad_()
    moved = output._replace(query=query)
    assert score(query, target)[3].argmin() == 3
    config = LossConfig(objective="infonce", rank_weight=0, filter="absolute")
    for guide, forgiven in ((None, True), (torch.eye(6, dtype=torch.float64), False)):
        total, _ = total_loss(moved, target, labels, config, relevance_share=0.0, guide=guide)
        (gradient,) = torch.autograd.grad(total, query)
        assert (gradient[3] == 0).all() == forgiven
        assert (gradient != 0).any()


def test_a_batch_that_is_filtered_whole_gives_zero_and_no_nan() -> None:
    output, target, labels = batch_of()
    config = LossConfig(objective="kl", rank_weight=0, filter="absolute", filter_margin=3.0)
    total, parts = total_loss(output, target, labels, config, relevance_share=0.2)
    (gradient,) = torch.autograd.grad(total, output.query)
    assert total.item() == 0
    assert parts["filter/dropped"].item() == 1
    assert (gradient == 0).all()


def test_sprcs_losses_are_added_with_their_weights() -> None:
    output, target, labels = batch_of()
    prompted = Prompted(F.normalize(values(6, 8, seed=5), dim=-1), values(6, 4, seed=6), values(3, 4, seed=7))
    config = LossConfig(objective="infonce", rank_weight=0, prompt_weight=0.4, align_weight=0.3)
    total, parts = total_loss(output, target, labels, config, relevance_share=0.0, prompted=prompted)
    nothing = np.zeros((6, 6), bool)
    first = slow_contrast(score(output.query, target).detach().numpy(), nothing, 0.07)
    prompt = slow_contrast(score(prompted.texts, target).detach().numpy(), nothing, 0.07)
    align = alignment_loss(prompted.fused, prompted.prompts).item()
    assert (parts["infonce"].item(), parts["prompt"].item(), parts["align"].item()) == pytest.approx((first, prompt, align), rel=1e-9)
    assert total.item() == pytest.approx(first + 0.4 * prompt + 0.3 * align, rel=1e-9)


def test_pairwise_is_the_ranking_loss_alone() -> None:
    """QuRe writes it as the divergence of a softmax over two scores from (1, 0)."""
    output, target, labels = batch_of()
    lost = F.normalize(values(6, 3, 8, seed=5), dim=-1)
    drawn = torch.tensor([True, True, False, True, True, True])
    config = LossConfig(objective="pairwise", rank_weight=1.0)
    total, parts = total_loss(output, target, labels, config, relevance_share=0.3, negatives=(lost, drawn))
    assert set(parts) == {"rank", "total"}
    pairs = torch.stack([paired_score(output.query, target), paired_score(output.query, lost)], dim=1) / 0.07
    divergence = F.kl_div(pairs.log_softmax(dim=1)[drawn], torch.tensor([1.0, 0.0]).double().expand(5, 2), reduction="batchmean")
    assert total.item() == pytest.approx(divergence.item(), rel=1e-9)
    queries, targets = torch.autograd.grad(total, (output.query, target))
    assert (queries[2] == 0).all()  # without a negative
    assert (targets[2] == 0).all()  # and no other row's
    assert (queries[drawn] != 0).any(dim=1).all()


# -- prompted texts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roomy() -> DQEModel:
    """With norms and biases that matter, and a position for every prompt and word."""
    config = model_config(layers=3, cross_attention_frequency=2, query_tokens=5, layer_norm_eps=1e-4, position_embeddings=40)
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def slow_prompted(model: DQEModel, prompts: np.ndarray, ids: list[int]) -> np.ndarray:
    slow = slow_qformer(model)
    words, positions = slow.weights["embeddings.word_embeddings.weight"], slow.weights["embeddings.position_embeddings.weight"]
    tokens = [words[ids[0]], *prompts, *(words[id] for id in ids[1:])]
    read = slow.encode(np.stack([token + positions[at] for at, token in enumerate(tokens)]))[0]
    projected = slow.linear("text_projection", read)
    return np.asarray(projected / np.linalg.norm(projected))


def test_a_prompted_text_is_the_slow_reference_alone_in_a_batch_and_padded(roomy: DQEModel) -> None:
    _, ids, mask = query_inputs(roomy, 5, 9)
    prompts = PromptTokens(roomy, seed=3)
    with torch.no_grad():
        prompts.tokens.mul_(20)
        expected = np.stack(
            [slow_prompted(roomy, prompts.tokens.double().numpy(), row[: int(m.sum())].tolist()) for row, m in zip(ids, mask, strict=True)]
        )
        np.testing.assert_allclose(prompts(roomy, ids, mask).numpy(), expected, atol=1e-5)
        longer, longer_mask = (F.pad(t, (0, 7)) for t in (ids, mask))
        garbage = torch.where(longer_mask == 0, 17, longer)
        np.testing.assert_allclose(prompts(roomy, garbage, longer_mask).numpy(), expected, atol=1e-5)
        alone = prompts(roomy, ids[1:2, : int(mask[1].sum())], mask[1:2, : int(mask[1].sum())])
        np.testing.assert_allclose(alone.numpy(), expected[1:2], atol=1e-5)
        words = roomy.embeddings.word_embeddings(ids)
        after = torch.cat([words, prompts.tokens.expand(5, -1, -1)], dim=1) + roomy.embeddings.position_embeddings.weight[:14]
        read = roomy.encode_sequence(after, torch.cat([mask, mask.new_ones(5, 5)], dim=1))[:, 0]
    elsewhere = F.normalize(roomy.text_projection(read), dim=-1)  # the same tokens, after the words
    assert np.abs(elsewhere.detach().numpy() - expected).max() > 1e-3


def test_prompt_tokens_leave_what_else_is_drawn(roomy: DQEModel) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, other = (PromptTokens(roomy, seed=seed).tokens for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (5, 16)
    assert torch.equal(first, PromptTokens(roomy, seed=1).tokens)
    assert not torch.equal(first, other)


# -- random negatives -----------------------------------------------------------------------------------------------------


def test_random_negatives_are_any_that_are_not_barred() -> None:
    rows = np.arange(20_000)
    rng = np.random.default_rng(0)
    barred = rng.integers(-1, 7, (len(rows), 3))
    found = draw_random(7, barred, rows, seed=0, epoch=0)
    assert not (found[:, None] == barred).any()
    assert ((found >= 0) & (found < 7)).all()
    free = [set(range(7)) - set(row.tolist()) for row in barred]
    expected = np.array([sum(1 / len(f) for f in free if i in f) for i in range(7)])
    np.testing.assert_allclose(np.bincount(found, minlength=7), expected, rtol=0.06)  # about 3,000 each: four deviations
    np.testing.assert_array_equal(found[5:9], draw_random(7, barred[5:9], rows[5:9], seed=0, epoch=0))  # whatever is in the batch
    for other in (draw_random(7, barred, rows, seed=1, epoch=0), draw_random(7, barred, rows, seed=0, epoch=1)):
        assert (found != other).mean() > 0.5


def test_no_random_negative_where_all_are_barred() -> None:
    barred = np.array([[0, 1, 2], [0, 0, 0], [2, -1, 2], [1, 0, 1]])
    for epoch in range(9):
        found = draw_random(3, barred, np.arange(4), seed=0, epoch=epoch)
        assert found[0] == -1
        assert found[1] in (1, 2)
        assert found[2] in (0, 1)
        assert found[3] == 2
