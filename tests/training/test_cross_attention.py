"""Cross-attention in another order of products against upstream's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_training import make_model, model_config
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

from dqe_training.model.cross_attention import FewQueryCrossAttention

SHAPES = [(1, 3, 9, 16, 2, 12), (5, 2, 7, 24, 3, 40), (2, 8, 65, 128, 4, 128)]  # B, Q, P, H, heads, Hv


def both(hidden: int, heads: int, image_width: int, **options: Any) -> tuple[Blip2QFormerMultiHeadAttention, FewQueryCrossAttention]:
    config = Blip2QFormerConfig(
        hidden_size=hidden, num_attention_heads=heads, encoder_hidden_size=image_width, attn_implementation="eager", **options
    )
    torch.manual_seed(0)
    upstream, ours = (kind(config, True) for kind in (Blip2QFormerMultiHeadAttention, FewQueryCrossAttention))
    for parameter in upstream.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(upstream.state_dict())
    return upstream.double().eval(), ours.double().eval()


def attend(attention: nn.Module, queries: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and gradients of everything but the keys' bias, which softmax does not see."""
    queries, images = queries.clone().requires_grad_(), images.clone().requires_grad_()
    torch.manual_seed(1)
    output = attention(queries, encoder_hidden_states=images)[0]
    output.pow(2).sum().backward()
    gradients = {name: parameter.grad for name, parameter in attention.named_parameters() if name != "key.bias"}
    return output, {"queries": queries.grad, "images": images.grad} | gradients  # type: ignore[dict-item]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_as_upstream(shape: tuple[int, ...], dropout: float) -> None:
    batch, count, tokens, hidden, heads, image_width = shape
    upstream, ours = both(hidden, heads, image_width, attention_probs_dropout_prob=dropout)
    queries, images = torch.randn(batch, count, hidden).double(), torch.randn(batch, tokens, image_width).double()
    expected, gradients = attend(upstream.train(), queries, images)
    output, found = attend(ours.train(), queries, images)  # the same draws: as many numbers, in the same order
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-9)
    assert output.shape == (batch, count, hidden)


def test_one_set_of_queries_for_all_images() -> None:
    _, ours = both(24, 3, 40)
    queries, images = torch.randn(1, 2, 24).double(), torch.randn(5, 7, 40).double()
    (once, _), (each, _) = (ours(q, encoder_hidden_states=images) for q in (queries, queries.expand(5, -1, -1)))
    torch.testing.assert_close(once, each)


def test_adapted_layers_are_projected_as_upstream() -> None:
    upstream, ours = both(24, 3, 40)
    for attention in (upstream, ours):
        attention.key = nn.Sequential(attention.key, nn.Linear(24, 24, bias=False).double())
        nn.init.eye_(attention.key[1].weight)
    queries, images = torch.randn(2, 2, 24).double(), torch.randn(2, 7, 40).double()
    torch.testing.assert_close(ours(queries, encoder_hidden_states=images)[0], upstream(queries, encoder_hidden_states=images)[0])


@pytest.mark.parametrize(("queries", "kind"), [(3, FewQueryCrossAttention), (4, Blip2QFormerMultiHeadAttention)])
def test_a_model_takes_it_where_it_is_fewer_products(queries: int, kind: type) -> None:
    model = make_model(model_config(query_tokens=queries))
    width, (tokens, image_width) = 8, (model.sizes.image_tokens, model.sizes.vision_width)
    counts = {FewQueryCrossAttention: queries * image_width * (tokens + width),
              Blip2QFormerMultiHeadAttention: width * tokens * (image_width + queries)}  # fmt: skip
    assert min(counts, key=counts.__getitem__) is kind
    assert type(model.qformer.encoder.layer[0].crossattention.attention) is kind


@pytest.mark.parametrize("queries", [3, 9])
def test_target_tokens_are_those_of_queries_for_every_image(queries: int) -> None:
    model = make_model(model_config(query_tokens=queries, layers=2))
    images = torch.randn(4, model.sizes.image_tokens, model.sizes.vision_width)
    embedded = model.query_tokens.expand(4, -1, -1)
    tokens = nn.functional.normalize(model.vision_projection(model._fuse(embedded, images, None)), dim=-1)
    torch.testing.assert_close(model.encode_targets(images), tokens)


def test_dropout_differs_between_images() -> None:
    model = make_model(model_config(dropout=0.5)).train()
    images = torch.randn(1, model.sizes.image_tokens, model.sizes.vision_width).expand(2, -1, -1)
    first, second = model.encode_targets(images)
    assert not torch.allclose(first, second)
