"""transformers' `Blip2ForImageTextRetrieval`: a directory with its configuration, or its weights file alone."""

from __future__ import annotations

from collections.abc import Mapping

from dqe_engine.contracts.preprocessing import PreprocessingSpec

from ..backbone.weights import UNUSED
from ..config.schema import ModelConfig, QFormerConfig, VisionConfig
from .formats import Layout
from .lavis import QFORMER_HEADS
from .lavis import UNUSED as LAVIS_UNUSED
from .moves import Moves
from .reading import Stored
from .towers import HEADS, count_layers, heads_of, shape_of

LAYOUT = Layout(
    name="transformers",
    title="BLIP-2's first stage, as transformers saves it",
    licence="Salesforce's BLIP-2 repositories on the hub are MIT; see the model card beside the weights",
    queries="zero_shot",
    is_this=lambda file: "vision_model.embeddings.class_embedding" in file.tensors,
    fit="stretch",
    background=(255, 255, 255),
)
_REASONS = {
    name: LAVIS_UNUSED["itm_head."] if name.startswith("itm_head") else "numbers from 0 on, which older versions stored" for name in UNUSED
}


def plan(tensors: Mapping[str, Stored], moves: Moves) -> None:
    """Every tensor has our model's name already."""
    moves.leave(tensors, _REASONS)
    for name in tensors:
        if name not in moves.unused:
            moves.add(name, name)


def describe(tensors: Mapping[str, Stored], *, vision_heads: int | None, qformer_heads: int | None, where: str) -> ModelConfig:
    """The model that a weights file without configuration holds; upstream's defaults for what no tensor shows. Raises CheckpointError."""
    width, _, patch, _ = shape_of("vision_model.embeddings.patch_embedding.weight", tensors, 4, where)
    tokens = shape_of("vision_model.embeddings.position_embedding", tensors, 3, where)[1]
    words, hidden = shape_of("embeddings.word_embeddings.weight", tensors, 2, where)
    positions = shape_of("embeddings.position_embeddings.weight", tensors, 2, where)[0]
    layers = count_layers("qformer.encoder.layer.", tensors, where)
    crossing = [n for n in range(1, layers) if f"qformer.encoder.layer.{n}.crossattention.attention.query.weight" in tensors]
    return ModelConfig(
        preprocessing=PreprocessingSpec(image_size=round((tokens - 1) ** 0.5) * patch),
        vision=VisionConfig(
            hidden_size=width, layers=count_layers("vision_model.encoder.layers.", tensors, where), patch_size=patch,
            heads=heads_of(width, vision_heads, HEADS, "--vision-heads", where),
            mlp_size=shape_of("vision_model.encoder.layers.0.mlp.fc1.weight", tensors, 2, where)[0],
        ),
        qformer=QFormerConfig(
            hidden_size=hidden, layers=layers, heads=heads_of(hidden, qformer_heads, QFORMER_HEADS, "--qformer-heads", where),
            mlp_size=shape_of("qformer.encoder.layer.0.intermediate_query.dense.weight", tensors, 2, where)[0],
            query_tokens=shape_of("query_tokens", tensors, 3, where)[1],
            embedding_dim=shape_of("vision_projection.weight", tensors, 2, where)[0],
            cross_attention_frequency=crossing[0] if crossing else layers, max_text_length=positions, dropout=0.1, vocab_size=words,
            position_embeddings=positions,
        ),
    )  # fmt: skip
