"""A complete bundle in a few kilobytes: real ONNX graphs and a real tokenizer with seeded weights, built without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dqe_engine.bundle import build_file_entries
from dqe_engine.contracts.graphs import (
    ATTRIBUTE_HEADS,
    DYNAMIC_AXES,
    QUERY_ENCODER,
    TARGET_ENCODER,
    VISION_ENCODER,
    GraphSizes,
    GraphSpec,
    graphs_of,
)
from dqe_engine.contracts.manifest import COMPOSED_QUERY, HEADS_FILE, MANIFEST_FILE, BundleManifest, GraphParity, HeadsManifest, Tolerance
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_engine.contracts.zones import ZoneSpec

SIZES = GraphSizes(
    image_size=32, image_tokens=16, vision_width=12, embedding_dim=8, target_tokens=3, hidden_size=8, query_tokens=2, attributes=2
)
VOCABULARY = AttributeVocabulary(attributes=(Attribute(name="colour", words=("red", "blue")), Attribute(name="shape", words=("round",))))
WORDS = ["the", "same", "but", "in", "red", "blue", "green", "round", "square", "with", "long", "short", "sleeves", "and", "more", "less"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
OPSET = 20
ENCODER_HASH = "e" * 64
TOLERANCE = Tolerance(max_error=1e-4, min_cosine=0.999999, recall_points=0.1, min_overlap=0.995)


def build_tiny_bundle(
    path: Path, *, seed: int = 0, zones: ZoneSpec | None = None, attributes: bool = True, model: dict[str, Any] | None = None
) -> Path:
    """Write the bundle to `path` (a new directory) and return it. Another `seed` is another model. Without `attributes` it is the same
    model but for its heads. `model`: what its manifest says of the training configuration."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for spec, nodes, weights in (_vision(rng), _query(rng), _heads(rng), _target(rng)):
        if attributes or spec is not ATTRIBUTE_HEADS:
            _write_graph(path, spec, nodes, weights)
    build_tokenizer().save(str(path / "tokenizer.json"))
    write_manifest(path, zones=zones, vocabulary=VOCABULARY if attributes else AttributeVocabulary(attributes=()), model=model)
    return path


def write_manifest(
    path: Path, *, zones: ZoneSpec | None = None, vocabulary: AttributeVocabulary = VOCABULARY, model: dict[str, Any] | None = None
) -> None:
    sizes = msgspec.structs.replace(SIZES, attributes=len(vocabulary.attributes))
    graphs = graphs_of(sizes)
    manifest = BundleManifest(
        name="tiny",
        producer="tests",
        opset=OPSET,
        model=model or {},
        encoder_hash=ENCODER_HASH,
        sizes=sizes,
        graphs=graphs,
        preprocessing=PreprocessingSpec(image_size=SIZES.image_size),
        tokenizer=TokenizerSpec(max_length=16),
        vocabulary=vocabulary,
        zones=zones or ZoneSpec(lo=0.1, hi=0.5),
        tolerance=TOLERANCE,
        parity=tuple(GraphParity(graph=name, outputs={}, shapes=()) for name in (*(spec.name for spec in graphs), COMPOSED_QUERY)),
        files=build_file_entries(path),
    )
    (path / MANIFEST_FILE).write_bytes(to_json(manifest))


def build_tiny_heads(path: Path, *, seed: int = 1, vocabulary: AttributeVocabulary = VOCABULARY, **changes: Any) -> Path:
    """Attribute heads alone, for tiny bundles, as `dqe-export --heads-only` writes them. `changes`: to their manifest."""
    path.mkdir(parents=True)
    sizes = msgspec.structs.replace(SIZES, attributes=len(vocabulary.attributes))
    _write_graph(path, *_heads(np.random.default_rng(seed), sizes), sizes)
    parity = GraphParity(graph=ATTRIBUTE_HEADS.name, outputs={}, shapes=())
    manifest = HeadsManifest(
        producer="tests", precision="float32", opset=OPSET, encoder_hash=ENCODER_HASH, sizes=sizes, vocabulary=vocabulary,
        vocabulary_hash=vocabulary.hash, zones=ZoneSpec(lo=0.2, hi=0.6), tolerance=TOLERANCE, parity=parity, files=build_file_entries(path),
    )  # fmt: skip
    (path / HEADS_FILE).write_bytes(to_json(msgspec.structs.replace(manifest, **changes)))
    return path


def build_tokenizer() -> Tokenizer:
    """WordPiece over a few words and single letters, lower-cased, `[CLS] text [SEP]`."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(dict.fromkeys(tokens))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def _vision(rng: np.random.Generator) -> tuple[GraphSpec, list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Mean colours of a 4 x 4 grid of patches, then tanh of a linear map."""
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["patches"], kernel_shape=[8, 8], strides=[8, 8]),  # (B, 3, 4, 4)
        helper.make_node("Reshape", ["patches", "flat"], ["columns"]),  # (B, 3, P)
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),  # (B, P, 3)
        helper.make_node("MatMul", ["rows", "w"], ["linear"]),
        helper.make_node("Tanh", ["linear"], ["image_tokens"]),  # (B, P, Hv)
    ]
    return VISION_ENCODER, nodes, {"flat": np.array([0, 3, -1]), "w": _weights(rng, 3, SIZES.vision_width)}


def _query(rng: np.random.Generator) -> tuple[GraphSpec, list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Bag of words plus mean image token; fused tokens are mixtures of the image's, and its mean beside each word."""
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["word_embeddings"]),  # (B, L, H)
        *_bag_of_words(),
        helper.make_node("ReduceMean", ["image_tokens", "one"], ["pooled"], keepdims=0),  # (B, Hv)
        helper.make_node("MatMul", ["pooled", "w_image"], ["image"]),
        helper.make_node("Add", ["image", "text"], ["fused"]),
        helper.make_node("LpNormalization", ["fused"], ["base_query"], axis=-1, p=2),
        helper.make_node("MatMul", ["image_tokens", "w_image"], ["projected"]),  # (B, P, H)
        helper.make_node("MatMul", ["mix", "projected"], ["fused_queries"]),  # (B, Q, H)
        helper.make_node("Unsqueeze", ["image", "one"], ["image3"]),  # (B, 1, H)
        helper.make_node("Add", ["word_embeddings", "image3"], ["fused_text"]),
    ]
    weights = {
        "embeddings": _weights(rng, build_tokenizer().get_vocab_size(), SIZES.hidden_size),
        "last": np.array([-1]),
        "one": np.array([1]),
        "w_image": _weights(rng, SIZES.vision_width, SIZES.hidden_size),
        "mix": _weights(rng, SIZES.query_tokens, SIZES.image_tokens),
    }
    return QUERY_ENCODER, nodes, weights


def _bag_of_words() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),  # (B, L, 1)
        helper.make_node("Mul", ["word_embeddings", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], ["text"], keepdims=0),  # (B, H)
    ]


def _heads(rng: np.random.Generator, sizes: GraphSizes = SIZES) -> tuple[GraphSpec, list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Sub-queries from the words and the fused tokens, weights from the words alone."""
    dim, heads = sizes.embedding_dim, sizes.attributes
    nodes = [
        *_bag_of_words(),
        helper.make_node("Mul", ["fused_text", "mask3"], ["masked_text"]),
        helper.make_node("Concat", ["fused_queries", "masked_text"], ["tokens"], axis=1),
        helper.make_node("ReduceSum", ["tokens", "one"], ["both"], keepdims=0),
        helper.make_node("MatMul", ["both", "w_heads"], ["heads"]),
        helper.make_node("Reshape", ["heads", "split"], ["sub_raw"]),
        helper.make_node("LpNormalization", ["sub_raw"], ["sub_queries"], axis=-1, p=2),
        helper.make_node("MatMul", ["text", "w_weights"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["attribute_weights"]),
    ]
    weights = {
        "last": np.array([-1]),
        "one": np.array([1]),
        "w_heads": _weights(rng, SIZES.hidden_size, heads * dim),
        "split": np.array([0, heads, dim]),
        "w_weights": _weights(rng, SIZES.hidden_size, heads),
    }
    return ATTRIBUTE_HEADS, nodes, weights


def _target(rng: np.random.Generator) -> tuple[GraphSpec, list[onnx.NodeProto], dict[str, np.ndarray]]:
    """M mixtures of the projected image tokens, unit norm."""
    nodes = [
        helper.make_node("MatMul", ["image_tokens", "w"], ["projected"]),  # (B, P, D)
        helper.make_node("MatMul", ["mix", "projected"], ["mixed"]),  # (B, M, D)
        helper.make_node("LpNormalization", ["mixed"], ["target_tokens"], axis=-1, p=2),
    ]
    weights = {
        "w": _weights(rng, SIZES.vision_width, SIZES.embedding_dim),
        "mix": _weights(rng, SIZES.target_tokens, SIZES.image_tokens),
    }
    return TARGET_ENCODER, nodes, weights


def _weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _write_graph(
    path: Path, spec: GraphSpec, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], sizes: GraphSizes = SIZES
) -> None:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def values(tensors: tuple) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                t.name, kinds[t.dtype], [a if isinstance(a, int) or a in DYNAMIC_AXES else getattr(sizes, a) for a in t.axes]
            )
            for t in tensors
        ]

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, spec.name, values(spec.inputs), values(spec.outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path / spec.file))


def query_inputs(batch: int, length: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image_tokens": rng.standard_normal((batch, SIZES.image_tokens, SIZES.vision_width)).astype(np.float32),
        "input_ids": rng.integers(0, 20, (batch, length)),
        "attention_mask": np.ones((batch, length), np.int64),
    }
