"""The graphs as modules with plain tensor inputs, one per spec in `dqe_engine.contracts.graphs`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dqe_engine.contracts.graphs import DYNAMIC_AXES, GraphSizes, GraphSpec
from dqe_training.model import DQEModel

from .inputs import random_arrays


class VisionEncoder(nn.Module):
    def __init__(self, model: DQEModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_images(pixel_values)


class QueryEncoder(nn.Module):
    def __init__(self, model: DQEModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.fuse_query(image_tokens, input_ids, attention_mask))


class AttributeHeads(nn.Module):
    def __init__(self, model: DQEModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, fused_queries: Tensor, fused_text: Tensor, word_embeddings: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        read = self.model.read_attributes(fused_queries, fused_text, word_embeddings, attention_mask)
        return read.sub_queries, read.attribute_weights


class TargetEncoder(nn.Module):
    def __init__(self, model: DQEModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_tokens: Tensor) -> Tensor:
        return self.model.encode_targets(image_tokens)


_MODULES: dict[str, Callable[[DQEModel], nn.Module]] = {
    "vision_encoder": VisionEncoder,
    "query_encoder": QueryEncoder,
    "attribute_heads": AttributeHeads,
    "target_encoder": TargetEncoder,
}


def graph_module(spec: GraphSpec, model: DQEModel) -> nn.Module:
    """The module whose forward has `spec`'s inputs, by name, and outputs, in order."""
    return _MODULES[spec.name](model).eval()


def random_inputs(spec: GraphSpec, sizes: GraphSizes, vocab_size: int, *, batch: int, text_length: int, seed: int) -> dict[str, Tensor]:
    """`random_arrays` as tensors."""
    arrays = random_arrays(spec, sizes, vocab_size, batch=batch, text_length=text_length, seed=seed)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def dynamic_shapes(spec: GraphSpec, max_text_length: int) -> dict[str, dict[int, torch.export.Dim]]:
    """Per forward argument, its symbolic axes: what `torch.onnx.export(dynamo=True)` takes."""
    limits = {"batch": torch.export.Dim("batch", min=1), "text_length": torch.export.Dim("text_length", min=1, max=max_text_length)}
    return {t.name: {i: limits[a] for i, a in enumerate(t.axes) if isinstance(a, str) and a in DYNAMIC_AXES} for t in spec.inputs}
