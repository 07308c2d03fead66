"""Attention in the form for GPUs against the model's own, in float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.tiny_training import make_model, model_config, query_inputs

from dqe_training.model.cross_attention import FewQueryCrossAttention
from dqe_training.model.gpu_attention import GpuQFormerAttention, GpuVisionAttention, gpu_attention


@torch.inference_mode()
@pytest.mark.parametrize("queries", [3, 9])  # with our cross-attention, and with upstream's
@pytest.mark.parametrize("batch", [1, 4])
def test_the_same_answers(queries: int, batch: int) -> None:
    model = make_model(model_config(query_tokens=queries, layers=2)).double()
    tokens, ids, mask = query_inputs(model, batch, 6)
    tokens, pixels = tokens.double(), torch.randn(batch, 3, 16, 16).double()
    expected = (model.vision_model(pixels)[0], model.encode_targets(tokens), *model.fuse_query(tokens, ids, mask))
    with gpu_attention(model):
        found = (model.vision_model(pixels)[0], model.encode_targets(tokens), *model.fuse_query(tokens, ids, mask))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_classes_are_as_before_also_after_a_failure() -> None:
    model = make_model(model_config(layers=2))
    kinds = [type(module) for module in model.modules()]
    assert FewQueryCrossAttention in kinds

    def fail() -> None:
        with gpu_attention(model):
            inside = Counter(type(module) for module in model.modules())
            assert (inside[GpuQFormerAttention], inside[GpuVisionAttention], inside[FewQueryCrossAttention]) == (4, 1, 0)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert [type(module) for module in model.modules()] == kinds
