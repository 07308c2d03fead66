"""Base queries: each against a slow reference, alone, in a batch and padded; what each depends on; that it trains and is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.slow_qformer import slow_base_queries
from support.tiny_training import make_model, model_config, query_inputs, train_config, write_checkpoint
from torch.nn import functional as F

from dqe_engine.contracts.parsing import to_json
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.config import ModelConfig
from dqe_training.model import DQEModel, score
from dqe_training.model.gpu_attention import gpu_attention

DEEP: dict[str, Any] = {"layers": 4, "cross_attention_frequency": 2, "query_tokens": 5, "layer_norm_eps": 1e-4}
KINDS: dict[str, ModelConfig] = {
    "mean": model_config(**DEEP),
    "cls": model_config(base_query="cls", **DEEP),
    "two_pass": model_config(base_query="two_pass", **DEEP),
    "two_pass, pooled": model_config(base_query="two_pass", pooled=True, **DEEP),
    "two_encoders": model_config(base_query="two_encoders", **DEEP),
    "zero_shot": model_config(base_query="zero_shot", **DEEP),
    "zero_shot, mostly text": model_config(base_query="zero_shot", text_share=0.8, **DEEP),
    "zero_shot, pooled": model_config(base_query="zero_shot", pooled=True, **DEEP),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> DQEModel:
    made = make_model(KINDS[request.param])
    with torch.no_grad():  # so that norms and biases matter, too
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 and not name.startswith("vision_model."):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


def assert_close(found: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(expected)).float(), rtol=0, atol=1e-5)


def test_it_is_the_slow_reference_alone_in_a_batch_and_padded(model: DQEModel) -> None:
    tokens, ids, mask = query_inputs(model, 5, 9)
    expected = slow_base_queries(model, tokens, ids, mask)
    assert np.abs(expected[:, None] - expected[None]).max(axis=-1)[~np.eye(5, dtype=bool)].min() > 1e-2  # five questions
    with torch.inference_mode():
        assert_close(model.fuse_query(tokens, ids, mask).base_query, expected)
        longer, longer_mask = (F.pad(t, (0, 7)) for t in (ids, mask))
        garbage = torch.where(longer_mask == 0, 17, longer)
        assert_close(model.fuse_query(tokens, garbage, longer_mask).base_query, expected)
        for row in range(5):
            length = int(mask[row].sum())
            assert_close(
                model.fuse_query(tokens[row : row + 1], ids[row : row + 1, :length], mask[row : row + 1, :length]).base_query,
                expected[row : row + 1],
            )
        with gpu_attention(model):
            assert_close(model.fuse_query(tokens, ids, mask).base_query, expected)


@pytest.mark.parametrize("wrong", ["no second pass", "an image in the second", "feed-forward of queries", "without the norm"])
def test_what_makes_two_passes(wrong: str) -> None:
    """Each corruption moves the query by more than what the test above allows."""
    model = make_model(KINDS["two_pass"])
    tokens, ids, mask = query_inputs(model, 5, 9)
    expected = torch.from_numpy(slow_base_queries(model, tokens, ids, mask)).float()
    encode, count = model._encode, model.query_tokens.shape[1]
    first = torch.cat([model.query_tokens.expand(5, -1, -1), model.embeddings(ids)], dim=1)
    with torch.inference_mode():
        fused = encode(first, model._with_queries(mask), tokens, count)
        again, whole = torch.cat([fused[:, :count], model.embeddings(ids)], dim=1), model._with_queries(mask)
        if wrong == "no second pass":
            output = fused
        elif wrong == "an image in the second":
            output = encode(again, whole, tokens, count)
        elif wrong == "feed-forward of queries":
            for layer in model.qformer.encoder.layer:
                layer.has_cross_attention = False
            output = encode(again, whole, None, count)
        else:
            model.qformer.layernorm = torch.nn.Identity()
            output = encode(again, whole)
        off = F.normalize(model.text_projection(output[:, count]), dim=-1) - expected
    assert off.abs().max() > 1e-2


def test_zero_shot_is_blip2s_own_scores_at_the_ends() -> None:
    """The text alone: the text-to-image scores that BLIP-2 is trained for. The image alone: the mean of its target tokens."""
    tokens, ids, mask = query_inputs(make_model(KINDS["zero_shot"]), 4, 6)
    text, image, between = (make_model(msgspec.structs.replace(KINDS["zero_shot"], text_share=share)) for share in (1.0, 0.0, 0.5))
    with torch.inference_mode():
        targets = text.encode_targets(tokens)
        first = text.qformer(query_embeds=text.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state[:, 0]
        upstream = F.normalize(text.text_projection(first), dim=-1)
        query = text.fuse_query(tokens, ids, mask).base_query
        torch.testing.assert_close(score(query, targets), score(upstream, targets), rtol=0, atol=1e-5)
        mean = F.normalize(targets.mean(dim=1), dim=-1)
        torch.testing.assert_close(image.fuse_query(tokens, ids, mask).base_query, mean, rtol=0, atol=1e-6)
        nothing = between.fuse_query(torch.zeros_like(tokens), ids, mask).base_query
    torch.testing.assert_close(nothing, upstream, rtol=0, atol=1e-5)  # no image has no part, whatever its share


def test_every_part_that_a_base_query_reads_gets_a_gradient(model: DQEModel) -> None:
    trained = make_model(model.config).train()
    tokens, ids, mask = query_inputs(trained, 4, 6)
    wanted = torch.randn(4, trained.sizes.embedding_dim, generator=torch.Generator().manual_seed(0))
    (trained.fuse_query(tokens, ids, mask).base_query * wanted).sum().backward()
    given = {name for name, parameter in trained.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 1e-7}
    last = f"qformer.encoder.layer.{trained.config.qformer.layers - 1}"
    kind = trained.config.base_query
    assert {"query_tokens", "text_projection.weight", "embeddings.word_embeddings.weight", "qformer.layernorm.weight"} <= given
    assert {f"qformer.encoder.layer.0.{part}.dense.weight" for part in ("intermediate", "intermediate_query")} <= given
    assert "qformer.encoder.layer.2.crossattention.attention.key.weight" in given
    assert ("vision_projection.weight" in given) == (kind == "zero_shot")
    assert (f"{last}.intermediate.dense.weight" in given) == (kind not in ("mean", "two_encoders"))
    second = {name for name, _ in trained.named_parameters() if name.startswith("second_")}
    assert second - given == {name for name in second if name.endswith(".key.bias")}  # which softmax does not see
    assert (f"{last}.intermediate_query.dense.weight" in given) == (kind != "cls")


@pytest.mark.parametrize("kind", ["two_pass", "two_encoders", "zero_shot"])
def test_gradients_are_those_of_differences(kind: str) -> None:
    model = make_model(KINDS[kind]).double()
    tokens, ids, mask = query_inputs(model, 2, 5)
    tokens = tokens.double().requires_grad_()
    wanted = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(*_: torch.Tensor) -> torch.Tensor:
        return (model.fuse_query(tokens, ids, mask).base_query * wanted).sum()

    some = (tokens, model.query_tokens, model.text_projection.weight, model.qformer.encoder.layer[3].output.dense.weight)
    assert torch.autograd.gradcheck(loss, some, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("kind", ["two_pass", "two_encoders", "zero_shot"])
def test_activations_computed_again_change_nothing(kind: str) -> None:
    gradients = []
    for again in (False, True):
        model = make_model(KINDS[kind]).train()
        model.checkpoint_activations = again
        model.fuse_query(*query_inputs(model, 4, 6)).base_query[:, 0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)


def test_a_checkpoint_says_which(tmp_path: Path) -> None:
    config = KINDS["zero_shot, mostly text"]
    loaded = load_checkpoint(write_checkpoint(tmp_path / "model", config))
    assert (loaded.model.config.base_query, loaded.model.config.text_share) == ("zero_shot", 0.8)
    old = msgspec.to_builtins(model_config())
    del old["base_query"], old["text_share"]
    assert msgspec.convert(old, ModelConfig) == model_config()
    assert b'"base_query": "two_pass"' in to_json(train_config(KINDS["two_pass"]))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match=r"text_share must lie in \[0, 1\]"):
        model_config(text_share=share)
