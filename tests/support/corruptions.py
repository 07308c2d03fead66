"""What can be wrong with an export, one small change each: to a traced graph, to a converted one, to what a bundle says of its inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from support.graph_edits import (
    GraphEdit,
    approximate_gelu,
    baked_in,
    heads,
    larger_epsilon,
    mixed,
    nudged,
    parameter,
    presence,
    renamed,
    reordered,
    reversed_rows,
    row_moved,
    row_set,
    sharper_attention,
    short_memory,
    swapped,
    times,
    with_batch_mean,
    without_mask,
    zeroed,
)
from support.replayed_export import replay

from dqe_engine.bundle import build_file_entries
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import MANIFEST_FILE, BundleManifest, Precision
from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import ExportError, ParityError
from dqe_export import bundle as bundle_module
from dqe_export.bundle import ExportOptions
from dqe_export.calibration import EvaluationData
from dqe_export.converted import check_conversion
from dqe_export.onnx_graph import save_graph
from dqe_export.parity import check_parity
from dqe_export.reading import check_reading
from dqe_training.checkpointing.checkpoint import Checkpoint
from dqe_training.model import DQEModel


@dataclass(frozen=True)
class Corruption:
    """A change to one graph. `said`: part of the message that refuses it."""

    graph: GraphSpec
    edit: GraphEdit
    said: str


_WORDS = "embeddings.word_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"

TRACED: dict[str, Corruption] = {
    # the vision tower
    "a weight nudged": Corruption(
        VISION_ENCODER, parameter("vision_model.embeddings.class_embedding", nudged(0.05)), "image_tokens differs from PyTorch"
    ),
    "rows of a matrix back to front": Corruption(
        VISION_ENCODER, parameter("vision_model.encoder.layers.0.mlp.fc1.weight", reversed_rows), "image_tokens differs from PyTorch"
    ),
    "blue for red": Corruption(
        VISION_ENCODER, parameter("vision_model.embeddings.patch_embedding.weight", lambda w: w[:, ::-1].copy()), "differs from PyTorch"
    ),
    "a norm's epsilon": Corruption(VISION_ENCODER, larger_epsilon, "image_tokens differs from PyTorch"),
    "image tokens back to front": Corruption(VISION_ENCODER, reordered("image_tokens"), "image_tokens differs from PyTorch"),
    "images that see their batch": Corruption(VISION_ENCODER, with_batch_mean("image_tokens", 1e-4), "image_tokens"),
    # the query encoder
    "positions from 32 on are 100": Corruption(QUERY_ENCODER, parameter(_POSITIONS, row_set(slice(32, None), 100)), "'text_length': 40"),
    "the last position lost": Corruption(QUERY_ENCODER, parameter(_POSITIONS, row_set(slice(-1, None), 0)), "'text_length': 40"),
    "words from the 33rd on lost": Corruption(QUERY_ENCODER, short_memory, "differs from PyTorch"),
    "a rare word": Corruption(QUERY_ENCODER, parameter(_WORDS, row_moved(211, 0.05)), "somewhere in the vocabulary"),
    "the padding's word": Corruption(QUERY_ENCODER, parameter(_WORDS, row_moved(0, 0.05)), "somewhere in the vocabulary"),
    "the last word": Corruption(QUERY_ENCODER, parameter(_WORDS, row_moved(-1, 0.05)), "somewhere in the vocabulary"),
    "query tokens swapped": Corruption(QUERY_ENCODER, parameter("query_tokens", lambda w: w[:, [1, 0, 2]]), "differs from PyTorch"),
    "query matrices swapped": Corruption(QUERY_ENCODER, swapped, "differs from PyTorch"),
    "a dropped mask": Corruption(QUERY_ENCODER, without_mask, "differs from PyTorch"),
    "GELU approximated": Corruption(QUERY_ENCODER, approximate_gelu, "differs from PyTorch"),
    "sharper attention": Corruption(QUERY_ENCODER, sharper_attention, "differs from PyTorch"),
    "the query's bias dropped": Corruption(QUERY_ENCODER, parameter("text_projection.bias", zeroed), "base_query differs from PyTorch"),
    "base_query × 0.9": Corruption(QUERY_ENCODER, times("base_query", 0.9), "base_query differs from PyTorch"),
    "queries that see their batch": Corruption(QUERY_ENCODER, with_batch_mean("fused_queries", 1e-3), "fused_queries"),
    # the attribute heads
    "heads permuted": Corruption(ATTRIBUTE_HEADS, heads(reversed_rows), "sub_queries differs from PyTorch"),
    "two heads mixed by a tenth": Corruption(ATTRIBUTE_HEADS, heads(mixed), "sub_queries differs from PyTorch"),
    "a head's weight nudged": Corruption(ATTRIBUTE_HEADS, parameter("attribute_heads.seeds", nudged(0.05)), "sub_queries differs"),
    "sub_queries × 0.9": Corruption(ATTRIBUTE_HEADS, times("sub_queries", 0.9), "sub_queries differs from PyTorch"),
    "weights permuted": Corruption(ATTRIBUTE_HEADS, presence(reversed_rows), "attribute_weights differs from PyTorch"),
    "a presence bias nudged": Corruption(
        ATTRIBUTE_HEADS, parameter("attribute_heads.presence.2.bias", nudged(0.05)), "attribute_weights differs from PyTorch"
    ),
    "weights × 3": Corruption(ATTRIBUTE_HEADS, times("attribute_weights", 3), "attribute_weights differs from PyTorch"),
    "one head's weight × 1.02": Corruption(
        ATTRIBUTE_HEADS, times("attribute_weights", [1.02, 1, 1, 1]), "attribute_weights differs from PyTorch"
    ),
    "weights below zero": Corruption(ATTRIBUTE_HEADS, times("attribute_weights", -1), "attribute_weights differs from PyTorch"),
    "a mask that the heads drop": Corruption(ATTRIBUTE_HEADS, without_mask, "differs from PyTorch"),
    # the target encoder
    "the targets' bias dropped": Corruption(TARGET_ENCODER, parameter("vision_projection.bias", zeroed), "target_tokens differs"),
    "target_tokens × 0.9": Corruption(TARGET_ENCODER, times("target_tokens", 0.9), "target_tokens differs from PyTorch"),
    "target tokens back to front": Corruption(TARGET_ENCODER, reordered("target_tokens"), "target_tokens differs from PyTorch"),
    "target matrices swapped": Corruption(TARGET_ENCODER, swapped, "target_tokens differs from PyTorch"),
    "not a number": Corruption(
        TARGET_ENCODER, parameter("vision_projection.bias", nudged(np.nan)), "target_tokens differs from PyTorch by nan"
    ),
    "a fixed batch": Corruption(QUERY_ENCODER, baked_in, "axis 'batch' of image_tokens was baked in as 2"),
    "another output": Corruption(TARGET_ENCODER, renamed, "graph has ['surprise'], the spec declares ['target_tokens']"),
}
"""Of graphs as they come from the exporter, which the float32 gate sees, also where the bundle is of another precision."""

CONVERTED: dict[str, Corruption] = {
    "the query's bias dropped": Corruption(QUERY_ENCODER, parameter("text_projection.bias", zeroed), "text_projection.bias are others"),
    "the targets' bias dropped": Corruption(
        TARGET_ENCODER, parameter("vision_projection.bias", zeroed), "vision_projection.bias are others"
    ),
    "a head's weight nudged": Corruption(
        ATTRIBUTE_HEADS, parameter("attribute_heads.seeds", nudged(0.05)), "attribute_heads.seeds are others"
    ),
    "two heads mixed by a tenth": Corruption(ATTRIBUTE_HEADS, heads(mixed), "are others"),
    "base_query × 0.9": Corruption(QUERY_ENCODER, times("base_query", 0.9), "base_query differs from PyTorch"),
    "sub_queries × 0.9": Corruption(ATTRIBUTE_HEADS, times("sub_queries", 0.9), "sub_queries differs from PyTorch"),
    "target_tokens × 0.9": Corruption(TARGET_ENCODER, times("target_tokens", 0.9), "target_tokens differs from PyTorch"),
    "target_tokens × 0.995": Corruption(TARGET_ENCODER, times("target_tokens", 0.995), "target_tokens differs from PyTorch in length"),
    "weights × 3": Corruption(ATTRIBUTE_HEADS, times("attribute_weights", 3), "attribute_weights differs from PyTorch"),
    "a dropped mask": Corruption(QUERY_ENCODER, without_mask, "differs from PyTorch"),
}
"""Of graphs as a conversion leaves them, which the bundle's own precision has to see."""


# -- what a bundle says of images, texts and attributes ----------------------------------------------------------------------


def rewrite(directory: Path, **changes: Any) -> None:
    """Change the manifest, and let it list what the files now are."""
    manifest = msgspec.structs.replace(_manifest(directory), **changes, files=build_file_entries(directory))
    (directory / MANIFEST_FILE).write_bytes(to_json(manifest))


def _manifest(directory: Path) -> BundleManifest:
    return parse_json(BundleManifest, (directory / MANIFEST_FILE).read_bytes(), where=MANIFEST_FILE)


def _preprocessing(directory: Path, **changes: Any) -> None:
    rewrite(directory, preprocessing=msgspec.structs.replace(_manifest(directory).preprocessing, **changes))


def _tokenizer_spec(directory: Path, **changes: Any) -> None:
    rewrite(directory, tokenizer=msgspec.structs.replace(_manifest(directory).tokenizer, **changes))


def _tokenizer_file(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "tokenizer.json"
    data = json.loads(path.read_bytes())
    edit(data)
    path.write_text(json.dumps(data))
    rewrite(directory)


def _another_order(directory: Path) -> None:
    attributes = _manifest(directory).vocabulary.attributes
    rewrite(directory, vocabulary=AttributeVocabulary(attributes=attributes[::-1]))


def _other_words(directory: Path) -> None:
    first, second, *others = _manifest(directory).vocabulary.attributes
    first, second = (msgspec.structs.replace(a, words=b.words) for a, b in ((first, second), (second, first)))
    rewrite(directory, vocabulary=AttributeVocabulary(attributes=(first, second, *others)))


def _without_marks(directory: Path) -> None:
    _tokenizer_file(directory, lambda data: data.update(post_processor=None))


def _normalizer(directory: Path, **changes: Any) -> None:
    _tokenizer_file(directory, lambda data: data["normalizer"].update(changes))


BUNDLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bilinear for bicubic": (partial(_preprocessing, resample="bilinear"), "preprocessing: an image (wide)"),
    "another mean": (partial(_preprocessing, mean=(0.47, 0.4578275, 0.40821073)), "preprocessing: an image (wide)"),
    "deviations of blue for red": (partial(_preprocessing, std=(0.27577711, 0.26130258, 0.26862954)), "preprocessing: an image (wide)"),
    "padded, not stretched": (partial(_preprocessing, fit="target_pad"), "preprocessing: an image (wide)"),
    "transparent over black": (partial(_preprocessing, background=(0, 0, 0)), "preprocessing: an image (transparent)"),
    "upper case kept": (partial(_normalizer, lowercase=False), "tokenizer: a text (capitals"),
    "accents kept": (partial(_normalizer, strip_accents=False), "tokenizer: a text (accents"),
    "no [CLS] and [SEP]": (_without_marks, "tokenizer: a text (plain"),
    "padded with another word": (partial(_tokenizer_spec, pad_id=1, pad_token="[UNK]"), "tokenizer: a text (plain"),
    "texts cut earlier": (partial(_tokenizer_spec, max_length=30), "tokenizer: a text (plain"),
    "attributes in another order": (_another_order, "attributes: the bundle calls its heads"),
    "attributes with each other's words": (_other_words, "attributes: the bundle's values or words"),
}


# -- asking the gate ---------------------------------------------------------------------------------------------------------


def refusal_of_traced(
    corruption: Corruption, precision: Precision, checkpoint: Checkpoint, bundle: Path, folder: Path, data: EvaluationData | None
) -> str | None:
    """What the export of one graph says when the exporter gives that graph of `bundle`, corrupted; None where it passes."""

    def edit(graph: str, proto: onnx.ModelProto) -> None:
        if graph == corruption.graph.name:
            corruption.edit(proto, checkpoint.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", replay(bundle, edit))
        try:
            bundle_module.write_graph(
                corruption.graph, checkpoint, folder, ExportOptions(precision=precision, data=data), lambda stage: None
            )
        except ExportError as error:
            return str(error)
    return None


def refusal_of_converted(
    corruption: Corruption, precision: Precision, model: DQEModel, sources: Path, converted: Path, folder: Path
) -> str | None:
    """What is said of a graph in `converted` that is corrupted after it was made from that in `sources`; None where it passes."""
    spec = corruption.graph
    proto = onnx.load(converted / spec.file)
    corruption.edit(proto, model)
    save_graph(proto, folder / spec.file)
    try:
        check_conversion(spec, sources / spec.file, folder / spec.file)
        check_parity(spec, model, folder / spec.file, precision=precision)
    except ParityError as error:
        return str(error)
    return None


def refusal_of_bundle(edit: Callable[[Path], None], checkpoint: Checkpoint, bundle: Path, folder: Path) -> str | None:
    """What is said of a copy of `bundle` whose manifest or tokenizer was changed; None where it passes."""
    shutil.copytree(bundle, folder / "bundle")
    edit(folder / "bundle")
    try:
        check_reading(checkpoint, folder / "bundle")
    except ParityError as error:
        return str(error)
    return None
