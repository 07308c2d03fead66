"""SPN4CIR (ACM MM 2024): `{"epoch": n, "state_dict": …}`, all under `blip_model.`, with a Q-Former of its own for the second pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dqe_engine.errors import CheckpointError

from .formats import Layout
from .lavis import add_layers, add_words
from .moves import Moves
from .reading import Stored, WeightFile, under
from .sprc import UNUSED
from .towers import count_layers

_PREFIX = "blip_model."
SECOND = "Qformer_query."
_LAYER = f"{SECOND}bert.encoder.layer."
_COPIED = "a copy that the second pass, which sees no image, never runs"


def _has_second(tensors: Mapping[str, Stored]) -> bool:
    return any(True for _ in under(SECOND, tensors))


LAYOUT = Layout(
    name="spn4cir",
    title="SPN4CIR's second stage on SPRC's Blip2QformerCirAlignPrompt",
    licence="BUAADreamer/SPN4CIR is MIT; the class is that of chunmeifeng/SPRC, which names no licence for its weights (as of 2026-11)",
    queries="two_encoders",
    is_this=lambda file: _has_second(file.tensors),
    unused={
        **UNUSED,
        f"{SECOND}cls.": "the language-model head, which writes captions",
        f"{SECOND}bert.embeddings.position_ids": "numbers from 0 on, which older versions stored",
        "text_proj.weight": "the first stage's projection of queries, whose place the second's takes",
        "text_proj.bias": "the first stage's projection of queries, whose place the second's takes",
    },
)


def without_prefix(file: WeightFile) -> WeightFile:
    """`file` with the names of the class that SPN4CIR's own holds as its only part; any other as it is."""
    if not all(name.startswith(_PREFIX) for name in file.tensors):
        return file
    return replace(file, tensors={name.removeprefix(_PREFIX): tensor for name, tensor in file.tensors.items()})


def read_second_pass(tensors: Mapping[str, Stored], moves: Moves, *, where: str) -> None:
    """Plan the second pass's text embeddings, Q-Former and projection, which is the model's only one. Raises CheckpointError."""
    if not _has_second(tensors):
        raise CheckpointError(f"{where}: no second Q-Former in it (no {SECOND}*), so a first stage, which is SPRC's; choose --format sprc")
    layers = count_layers(_LAYER, tensors, where)
    add_words(moves, "second_embeddings.", f"{SECOND}bert.")
    add_layers(moves, "second_qformer.", f"{SECOND}bert.", range(layers), crossing=(), kinds=("",))
    for end in ("weight", "bias"):
        moves.add(f"text_projection.{end}", f"text_proj_q.{end}")
    for layer in range(layers):
        moves.leave(tensors, {f"{_LAYER}{layer}.{part}.": _COPIED for part in ("crossattention", "intermediate_query", "output_query")})
