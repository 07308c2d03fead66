"""The exported graphs, declared once: names, dtypes and named axes drive dummy inputs, export, validation and binding.

An axis is a fixed size (int), or a name. Named axes in `DYNAMIC_AXES` stay symbolic in the graph; every other name is a
size of the model, found in `GraphSizes`.
"""

from __future__ import annotations

from typing import Literal

from .parsing import Contract

DYNAMIC_AXES = ("batch", "text_length")


class GraphSizes(Contract, frozen=True):
    """Sizes of one model: everything about a graph's shapes that is not dynamic."""

    image_size: int
    image_tokens: int  # P
    vision_width: int  # Hv
    embedding_dim: int  # D
    target_tokens: int  # M
    hidden_size: int  # H, of the Q-Former
    query_tokens: int  # Q
    attributes: int  # A, 0 for a model without attribute heads


class TensorSpec(Contract, frozen=True):
    name: str
    dtype: Literal["float32", "int64"]
    axes: tuple[str | int, ...]

    def sized(self, sizes: GraphSizes) -> tuple[int | str, ...]:
        """The axes with one model's sizes put in: the names that are left are dynamic."""
        return tuple(a if isinstance(a, int) or a in DYNAMIC_AXES else int(getattr(sizes, a)) for a in self.axes)

    def shape(self, sizes: GraphSizes, **dynamic: int) -> tuple[int, ...]:
        """Concrete shape, given the model's sizes and a value per dynamic axis."""
        return tuple(dynamic[a] if isinstance(a, str) else a for a in self.sized(sizes))


class GraphSpec(Contract, frozen=True):
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"


VISION_ENCODER = GraphSpec(
    name="vision_encoder",
    inputs=(TensorSpec(name="pixel_values", dtype="float32", axes=("batch", 3, "image_size", "image_size")),),
    outputs=(TensorSpec(name="image_tokens", dtype="float32", axes=("batch", "image_tokens", "vision_width")),),
)

_FUSED = (
    TensorSpec(name="fused_queries", dtype="float32", axes=("batch", "query_tokens", "hidden_size")),
    TensorSpec(name="fused_text", dtype="float32", axes=("batch", "text_length", "hidden_size")),
    TensorSpec(name="word_embeddings", dtype="float32", axes=("batch", "text_length", "hidden_size")),
)
_MASK = TensorSpec(name="attention_mask", dtype="int64", axes=("batch", "text_length"))

QUERY_ENCODER = GraphSpec(
    name="query_encoder",
    inputs=(
        TensorSpec(name="image_tokens", dtype="float32", axes=("batch", "image_tokens", "vision_width")),
        TensorSpec(name="input_ids", dtype="int64", axes=("batch", "text_length")),
        _MASK,
    ),
    outputs=(TensorSpec(name="base_query", dtype="float32", axes=("batch", "embedding_dim")), *_FUSED),
)

ATTRIBUTE_HEADS = GraphSpec(
    name="attribute_heads",
    inputs=(*_FUSED, _MASK),
    outputs=(
        TensorSpec(name="sub_queries", dtype="float32", axes=("batch", "attributes", "embedding_dim")),
        TensorSpec(name="attribute_weights", dtype="float32", axes=("batch", "attributes")),
    ),
)

TARGET_ENCODER = GraphSpec(
    name="target_encoder",
    inputs=(TensorSpec(name="image_tokens", dtype="float32", axes=("batch", "image_tokens", "vision_width")),),
    outputs=(TensorSpec(name="target_tokens", dtype="float32", axes=("batch", "target_tokens", "embedding_dim")),),
)

GRAPHS: tuple[GraphSpec, ...] = (VISION_ENCODER, QUERY_ENCODER, ATTRIBUTE_HEADS, TARGET_ENCODER)


def graphs_of(sizes: GraphSizes) -> tuple[GraphSpec, ...]:
    """The graphs that a model of these sizes has: without attributes (A = 0) there are no attribute heads. The query encoder is the same,
    so that a bundle without heads can take some later."""
    return tuple(graph for graph in GRAPHS if sizes.attributes or graph is not ATTRIBUTE_HEADS)
