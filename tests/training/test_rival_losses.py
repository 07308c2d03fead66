"""SPRC's and QuRe's losses and GISTEmbed's filter: against slow float64 references in loops, their limits, and in training."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.slow_qformer import slow_qformer
from support.tiny_training import make_model, make_trainer, model_config, query_inputs, train_config, write_checkpoint
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from dqe_engine.errors import InputError
from dqe_training.checkpoint import load_checkpoint
from dqe_training.config import LossConfig, TrainConfig, load_config
from dqe_training.data.triplets import TripletData
from dqe_training.losses.alignment import alignment_loss
from dqe_training.losses.margin_filter import MarginStrategy, suspected_positives
from dqe_training.losses.total import BatchLabels, Prompted, total_loss
from dqe_training.model import DQEModel, QueryOutput, paired_score, score
from dqe_training.model.prompts import PromptTokens
from dqe_training.trns.drawing import draw_random

Tiny = tuple[TripletData, np.ndarray]
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


# -- in training ----------------------------------------------------------------------------------------------------------


def config_with(loss: dict[str, Any], *, trns: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> TrainConfig:
    config = train_config(model_config(**(model or {})))
    changed = msgspec.structs.replace(config.trns, **(trns or {}))
    return msgspec.structs.replace(config, loss=LossConfig(**loss), trns=changed)


SPRC = config_with(
    {"objective": "infonce", "rank_weight": 0, "prompt_weight": 1.0, "align_weight": 1.0},
    trns={"enabled": False}, model={"base_query": "two_pass", "dropout": 0.2, "position_embeddings": 40},
)  # fmt: skip
QURE = config_with({"objective": "pairwise", "rank_weight": 1.0}, trns={"warmup": "random", "rule": "two-drops"}, model={"dropout": 0.2})
FILTERED = config_with({"objective": "infonce", "filter": "relative", "filter_margin": 0.05}, model={"dropout": 0.2})


@pytest.mark.parametrize("config", [SPRC, QURE, FILTERED], ids=["sprc", "qure", "filtered"])
def test_a_training_resumes_to_the_bit(config: TrainConfig, tiny_data: Tiny, tmp_path: Path) -> None:
    """From a checkpoint of the first epoch, before anything was mined."""
    events: list[dict[str, Any]] = []

    def watch(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "step" and event["step"] == 4:
            shutil.copytree(tmp_path / "whole" / "step-00000003", tmp_path / "resumed" / "step-00000003")

    whole = make_trainer(config, *tiny_data, tmp_path / "whole", listener=watch).train()
    resumed = make_trainer(config, *tiny_data, tmp_path / "resumed").train()
    assert [name for name, value in whole.state_dict().items() if not torch.equal(value, resumed.state_dict()[name])] == []
    newest = [load_file(tmp_path / run / "step-00000015" / "state.safetensors") for run in ("whole", "resumed")]
    assert newest[0].keys() == newest[1].keys()
    assert all(torch.equal(value, newest[1][name]) for name, value in newest[0].items())
    steps = [event for event in events if event["event"] == "step"]
    wanted = {"sprc": {"infonce", "prompt", "align"}, "qure": {"rank"}, "filtered": {"infonce", "filter/dropped"}}
    name = next(name for name, made in {"sprc": SPRC, "qure": QURE, "filtered": FILTERED}.items() if made == config)
    for event in steps:
        assert wanted[name] <= {key.removeprefix("loss/") for key in event if key.startswith("loss/")}
    if name == "sprc":
        drawn = PromptTokens(whole, seed=config.optim.seed).tokens
        assert (newest[0]["prompt_tokens"] != drawn).all()  # they train
        assert "prompt_tokens" not in whole.state_dict()
    if name == "qure":
        assert {event["epoch"] for event in events if event["event"] == "refresh"} == {1, 2}


def test_without_sprcs_losses_nothing_changes(tiny_data: Tiny, tmp_path: Path) -> None:
    """The prompts' seed is their own: a training that has them, at weights too small to matter, is the same training."""
    losses: dict[str, list[float]] = {}
    model = msgspec.structs.replace(SPRC.model, qformer=msgspec.structs.replace(SPRC.model.qformer, dropout=0.0))
    for name, weight in (("off", 0.0), ("on", 1e-30)):
        loss = msgspec.structs.replace(SPRC.loss, prompt_weight=weight, align_weight=weight)
        events: list[dict[str, Any]] = []
        config = msgspec.structs.replace(SPRC, loss=loss, model=model)
        make_trainer(config, *tiny_data, tmp_path / name, listener=events.append).train()
        losses[name] = [event["loss/infonce"] for event in events if event["event"] == "step"]
    assert losses["off"] == losses["on"]
    assert len(set(losses["on"])) > 10


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = model_config(base_query="two_pass", position_embeddings=40, attribute_weights=False)
    return write_checkpoint(tmp_path_factory.mktemp("rivals") / "model", config)


def start_config(start: Path, *overrides: str) -> TrainConfig:
    return load_config("start", [f"start={start}", "optim.batch_size=8", "optim.epochs=2", "optim.log_every=1", *overrides])


def test_the_start_guides(start: Path, tiny_data: Tiny, tmp_path: Path) -> None:
    """The share that is dropped is what the start's own scores say, however far the model has moved; with LoRA, and resumed."""
    config = start_config(
        start, "finetune=lora", "loss.objective=infonce", "loss.filter=absolute", "loss.filter_margin=0.1", "loss.filter_guide=start",
        "trns.enabled=false", "optim.learning_rate=0.05", "optim.checkpoint_every=3",
    )  # fmt: skip
    data, _ = tiny_data
    events: list[dict[str, Any]] = []
    trainer = make_trainer(config, *tiny_data, tmp_path / "run", listener=events.append)
    trainer.train()
    step, images = trainer._step, trainer._images
    made, guide = load_checkpoint(start).model, step._guide
    assert guide is not None
    steps = [event for event in events if event["event"] == "step"]
    for at in (0, len(steps) - 1):
        epoch, position = divmod(at, trainer.steps_per_epoch)
        rows = trainer._epoch_order(epoch)[position * 8 : (position + 1) * 8]
        read, _ = data.draw_texts(config.optim.seed, epoch)
        ids, mask = step._texts(torch.from_numpy(read[rows]))
        with torch.no_grad():
            scores = score(made.encode_query(images(data.reference[rows]), ids, mask).query, made.encode_targets(images(data.target[rows])))
        dropped = slow_filter(scores.numpy(), "absolute", 0.1)
        others = data.target[rows][:, None] != data.target[rows][None]
        assert steps[at]["loss/filter/dropped"] == pytest.approx((dropped & others).sum() / others.sum(), abs=1e-5)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in guide.state_dict().items())
    assert any(not torch.equal(value, made.state_dict()[name]) for name, value in trainer.model.state_dict().items())
    shutil.rmtree(tmp_path / "run" / "step-00000010")
    again = make_trainer(config, *tiny_data, tmp_path / "run").train()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trainer.model.state_dict().items())


def test_a_temperature_may_be_learned_from_a_start_on(start: Path, tiny_data: Tiny, tmp_path: Path) -> None:
    config = start_config(start, "model.learned_temperature=true", "loss.objective=infonce", "loss.prompt_weight=1", "loss.align_weight=1")
    model = make_trainer(config, *tiny_data, tmp_path / "run").train()
    assert model.temperature(0.07) != 0.07
    assert model.config.base_query == "two_pass"
    onward = write_checkpoint(tmp_path / "learned", msgspec.structs.replace(model_config(), learned_temperature=True))
    assert not load_config("start", [f"start={onward}", "model.learned_temperature=false"]).model.learned_temperature
    fixed = load_config("start", [f"start={onward}", "model.learned_temperature=false", "optim.batch_size=8", "optim.epochs=1"])
    assert make_trainer(fixed, *tiny_data, tmp_path / "fixed").model.temperature(0.07) == 0.07


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.objective=pairwise", "trns.enabled=false"], "loss.objective pairwise needs a negative at every step"),
        (["loss.objective=pairwise"], "set trns.enabled to true, and trns.warmup to random"),
        (["loss.objective=pairwise", "loss.rank_weight=0", "trns.warmup=random"], "rank_weight must be above 0"),
        (["loss.objective=pairwise", "loss.filter=absolute", "trns.warmup=random"], "no in-batch negatives, so filter must be off"),
        (["trns.warmup=random", "trns.warmup_epochs=0"], "warmup is random, but there is none"),
        (["trns.warmup=random", "trns.enabled=false"], "warmup is random, but there is none"),
        (["loss.filter_margin=0.1"], "filter_margin and filter_guide are set, but filter is off"),
        (["loss.filter=absolute", "loss.filter_margin=-1"], "filter_margin must be at least 0"),
        (["loss.filter=relative", "loss.filter_margin=1.5"], "a share, so at most 1"),
        (["loss.filter=absolute", "loss.filter_guide=start"], "so set start, and optim.vision_learning_rate to 0"),
        (["loss.prompt_weight=1"], "8 tokens into a text of 32, but there are 32 positions; set model.qformer.position_embeddings to 40"),
        (["loss.align_weight=-1"], "align_weight must be at least 0"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("garments", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_alone_take_no_prompts(start: Path) -> None:
    with pytest.raises(InputError, match=r"keeps the encoder as it is, so loss\.prompt_weight"):
        load_config("start", [f"start={start}", "finetune=attributes", "loss.prompt_weight=1"])
