"""Salesforce's LAVIS: `{"model": state_dict}` of BLIP-2's first stage, and the names that everything built on it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dqe_engine.errors import CheckpointError

from ..config.schema import QFormerConfig
from .formats import Layout, is_lavis_like
from .moves import Moves
from .reading import Stored
from .towers import count_layers, heads_of, shape_of

LAYOUT = Layout(
    name="lavis",
    title="BLIP-2's first stage, as LAVIS saves it",
    licence="salesforce/LAVIS is BSD-3-Clause; the towers are EVA's (MIT) or OpenAI CLIP's (MIT); see the terms beside the weights",
    queries="zero_shot",
    is_this=lambda file: file.wrapper == "model" and is_lavis_like(file),
    fit="stretch",
    background=(255, 255, 255),
)
TOWER = "visual_encoder."
QFORMER_HEADS = {768: 12}
"""Attention heads of the published Q-Formers, by width."""
MAX_TEXT_LENGTH = 32
UNUSED: Mapping[str, str] = {
    "Qformer.cls.": "the language-model head, which writes captions",
    "itm_head.": "the matching head, which judges one pair at a time",
    "temp": "the temperature of a training's loss, which changes no ranking",
    "Qformer.bert.embeddings.position_ids": "numbers from 0 on, which older versions stored",
}
_BERT = "Qformer.bert."
_PAIRS = {
    "vision_model.post_layernorm": "ln_vision",
    "vision_projection": "vision_proj",
    "text_projection": "text_proj",
}
_PARTS = ("attention", "crossattention")
_FEED_FORWARD = ("intermediate.dense", "output.dense", "output.LayerNorm")


def read_qformer(tensors: Mapping[str, Stored], moves: Moves, *, heads: int | None, where: str) -> QFormerConfig:
    """Describe everything but the tower, and plan where it goes. Raises CheckpointError."""
    layer_prefix = f"{_BERT}encoder.layer."
    words, width = shape_of(f"{_BERT}embeddings.word_embeddings.weight", tensors, 2, where)
    positions = shape_of(f"{_BERT}embeddings.position_embeddings.weight", tensors, 2, where)[0]
    layers = count_layers(layer_prefix, tensors, where)
    crossing = [n for n in range(layers) if f"{layer_prefix}{n}.crossattention.self.query.weight" in tensors]
    every = crossing[1] if len(crossing) > 1 else layers
    if crossing != list(range(0, layers, every)):
        raise CheckpointError(f"{where}: cross-attention in layers {crossing} of {layers}, expected every n-th from the first")
    moves.add("query_tokens", "query_tokens")
    add_words(moves, "embeddings.", _BERT)
    add_layers(moves, "qformer.", _BERT, range(layers), crossing=crossing, kinds=("", "_query"))
    _add_pairs(moves, _PAIRS)
    return QFormerConfig(
        hidden_size=width,
        layers=layers,
        heads=heads_of(width, heads, QFORMER_HEADS, "--qformer-heads", where),
        mlp_size=shape_of(f"{layer_prefix}0.intermediate_query.dense.weight", tensors, 2, where)[0],
        query_tokens=shape_of("query_tokens", tensors, 3, where)[1],
        embedding_dim=shape_of("vision_proj.weight", tensors, 2, where)[0],
        cross_attention_frequency=every,
        max_text_length=min(MAX_TEXT_LENGTH, positions),
        dropout=0.1,
        vocab_size=words,
        position_embeddings=positions,
    )


def add_words(moves: Moves, ours: str, theirs: str) -> None:
    """The tables of words and positions of the BERT at `theirs`."""
    for table in ("word_embeddings.weight", "position_embeddings.weight"):
        moves.add(f"{ours}{table}", f"{theirs}embeddings.{table}")


def add_layers(moves: Moves, ours: str, theirs: str, layers: range, *, crossing: Collection[int], kinds: Sequence[str]) -> None:
    """The LayerNorm of the embeddings and the `layers` of the BERT at `theirs`. `crossing`: those with cross-attention; `kinds`: of
    feed-forward layers, "" of texts and "_query" of queries."""
    names = {f"{ours}layernorm": f"{theirs}embeddings.LayerNorm"}
    for layer in layers:
        here, there = f"{ours}encoder.layer.{layer}.", f"{theirs}encoder.layer.{layer}."
        for part in _PARTS if layer in crossing else _PARTS[:1]:
            names |= {f"{here}{part}.attention.{name}": f"{there}{part}.self.{name}" for name in ("query", "key", "value")}
            names |= {f"{here}{part}.output.{name}": f"{there}{part}.output.{name}" for name in ("dense", "LayerNorm")}
        for kind in kinds:
            for name in _FEED_FORWARD:
                first, rest = name.split(".")
                names[f"{here}{first}{kind}.{rest}"] = f"{there}{first}{kind}.{rest}"
    _add_pairs(moves, names)


def _add_pairs(moves: Moves, names: Mapping[str, str]) -> None:
    for ours, theirs in names.items():
        for end in ("weight", "bias"):
            moves.add(f"{ours}.{end}", f"{theirs}.{end}")
