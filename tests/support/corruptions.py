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
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from support.replayed_export import drop_mask, replay

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
from dqe_training.checkpoint import Checkpoint
from dqe_training.model import DQEModel

GraphEdit = Callable[[onnx.ModelProto, DQEModel], None]
Array = NDArray[Any]


@dataclass(frozen=True)
class Corruption:
    """A change to one graph. `said`: part of the message that refuses it."""

    graph: GraphSpec
    edit: GraphEdit
    said: str


# -- weights, found by their values, so that it does not matter what an exporter calls them --------------------------------------


def change(proto: onnx.ModelProto, model: DQEModel, parameter: str, edit: Callable[[Array], Array]) -> None:
    """Change the constant that holds a parameter of the model, transposed or not, as if the parameter were another."""
    wanted = dict(model.named_parameters())[parameter].detach().numpy()
    found = 0
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        for turned in (False, True):
            value = values.T if turned else values
            if value.shape == wanted.shape and np.allclose(value.astype(np.float32), wanted, rtol=1e-3, atol=1e-6):
                changed = edit(value.astype(np.float32)).astype(values.dtype)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed.T if turned else changed), tensor.name))
                found += 1
                break
    assert found, f"no constant of the graph is {parameter}"


def parameter(name: str, edit: Callable[[Array], Array]) -> GraphEdit:
    return lambda proto, model: change(proto, model, name, edit)


def zeroed(values: Array) -> Array:
    return np.zeros_like(values)


def reversed_rows(values: Array) -> Array:
    return values[::-1].copy()


def row_set(rows: slice, value: float) -> Callable[[Array], Array]:
    def edit(values: Array) -> Array:
        changed = values.copy()
        changed[rows] = value
        return changed

    return edit


def row_moved(row: int, amount: float) -> Callable[[Array], Array]:
    def edit(values: Array) -> Array:
        changed = values.copy()
        changed[row] += amount
        return changed

    return edit


def nudged(amount: float) -> Callable[[Array], Array]:
    def edit(values: Array) -> Array:
        changed = values.copy()
        changed.flat[0] += amount
        return changed

    return edit


def mixed(values: Array) -> Array:
    """A tenth of the second head in the first."""
    changed = values.copy()
    changed[0] = 0.9 * values[0] + 0.1 * values[1]
    return changed


def both(*edits: GraphEdit) -> GraphEdit:
    def edit(proto: onnx.ModelProto, model: DQEModel) -> None:
        for one in edits:
            one(proto, model)

    return edit


def heads(edit: Callable[[Array], Array]) -> GraphEdit:
    return both(*(parameter(f"attribute_heads.{name}", edit) for name in ("seeds", "projection")))


def presence(edit: Callable[[Array], Array]) -> GraphEdit:
    return both(*(parameter(f"attribute_heads.presence.2.{name}", edit) for name in ("weight", "bias")))


def swapped(proto: onnx.ModelProto, model: DQEModel) -> None:
    """The first two of several equally large matrices change places."""
    shapes: dict[tuple[int, ...], list[onnx.TensorProto]] = {}
    for tensor in proto.graph.initializer:
        if len(tensor.dims) == 2 and min(tensor.dims) >= 16:
            shapes.setdefault(tuple(tensor.dims), []).append(tensor)
    first, second = next(tensors[:2] for tensors in shapes.values() if len(tensors) > 1)
    arrays = [numpy_helper.to_array(tensor).copy() for tensor in (first, second)]
    for tensor, array in zip((second, first), arrays, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


# -- nodes -------------------------------------------------------------------------------------------------------------------


def after(output: str, *nodes: tuple[str, list[str]], **constants: Any) -> GraphEdit:
    """Put nodes of (operator, inputs) in a row behind an output: "$" is what came before, names in `constants` are constants."""

    def edit(proto: onnx.ModelProto, model: DQEModel) -> None:
        node = next(node for node in proto.graph.node if output in node.output)
        before = f"{output}_before"
        node.output[list(node.output).index(output)] = before
        for other in proto.graph.node:
            other.input[:] = [before if name == output else name for name in other.input]
        for name, value in constants.items():
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{output}_{name}"))
        names = {"$": before} | {name: f"{output}_{name}" for name in constants}
        last = before
        for position, (kind, inputs) in enumerate(nodes):
            made = output if position == len(nodes) - 1 else f"{output}_step{position}"
            proto.graph.node.append(helper.make_node(kind, [names.get(name, last if name == "_" else name) for name in inputs], [made]))
            last = made

    return edit


def times(output: str, factor: Any) -> GraphEdit:
    return after(output, ("Mul", ["$", "factor"]), factor=np.float32(factor))


def with_batch_mean(output: str, share: float) -> GraphEdit:
    """Some of the batch's mean in every row: nothing for a batch of one."""
    return after(
        output, ("ReduceMean", ["$", "axes"]), ("Sub", ["_", "$"]), ("Mul", ["_", "share"]), ("Add", ["$", "_"]),
        axes=np.array([0]), share=np.float32(share),
    )  # fmt: skip


def reordered(output: str) -> GraphEdit:
    """The second axis back to front."""
    return after(
        output, ("Slice", ["$", "start", "stop", "axes", "step"]),
        start=np.array([-1]), stop=np.array([-(2**31)]), axes=np.array([1]), step=np.array([-1]),
    )  # fmt: skip


def approximate_gelu(proto: onnx.ModelProto, model: DQEModel) -> None:
    nodes = [node for node in proto.graph.node if node.op_type == "Gelu"]
    assert nodes
    for node in nodes:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("approximate", "tanh"))


def larger_epsilon(proto: onnx.ModelProto, model: DQEModel) -> None:
    nodes = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    assert nodes
    for node in nodes:
        kept = [attribute for attribute in node.attribute if attribute.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("epsilon", 1e-2)])


def sharper_attention(proto: onnx.ModelProto, model: DQEModel) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Softmax")
    position = list(proto.graph.node).index(node)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1.05), "sharper"))
    proto.graph.node.insert(position, helper.make_node("Mul", [node.input[0], "sharper"], ["sharper_scores"]))
    node.input[0] = "sharper_scores"


def without_mask(proto: onnx.ModelProto, model: DQEModel) -> None:
    drop_mask(proto)


def short_memory(proto: onnx.ModelProto, model: DQEModel) -> None:
    """Tokens from the 33rd on all become the first word."""
    for name, value in (("limit", 32), ("one", 1), ("axis", 1), ("zero", 0)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([value] if name == "axis" else value), f"short_{name}"))
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["short_shape"]),
        helper.make_node("Gather", ["short_shape", "short_one"], ["short_length"]),
        helper.make_node("Range", ["short_zero", "short_length", "short_one"], ["short_positions"]),
        helper.make_node("Less", ["short_positions", "short_limit"], ["short_within"]),
        helper.make_node("Where", ["short_within", "input_ids", "short_zero"], ["short_ids"]),
    ]
    for node in proto.graph.node:
        node.input[:] = ["short_ids" if name == "input_ids" and node.op_type == "Gather" else name for name in node.input]
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)


def baked_in(proto: onnx.ModelProto, model: DQEModel) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def renamed(proto: onnx.ModelProto, model: DQEModel) -> None:
    proto.graph.node.extend([helper.make_node("Identity", [proto.graph.output[0].name], ["surprise"])])
    proto.graph.output[0].name = "surprise"


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
    manifest = parse_json(BundleManifest, (directory / MANIFEST_FILE).read_bytes(), where=MANIFEST_FILE)
    manifest = msgspec.structs.replace(manifest, **changes)
    manifest = msgspec.structs.replace(manifest, files=build_file_entries(directory))
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
        patch.setattr(bundle_module, "time_graph", lambda *_: ())
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
