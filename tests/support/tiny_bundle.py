"""A complete bundle in a few kilobytes: real ONNX graphs and a real tokenizer with seeded weights, built without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dqe_engine.bundle import build_file_entries
from dqe_engine.contracts.graphs import DYNAMIC_AXES, GRAPHS, QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER, GraphSizes, GraphSpec
from dqe_engine.contracts.manifest import MANIFEST_FILE, BundleManifest, Tolerance
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_engine.contracts.zones import ZoneSpec

SIZES = GraphSizes(image_size=32, image_tokens=16, vision_width=12, embedding_dim=8, target_tokens=3, attributes=2)
VOCABULARY = AttributeVocabulary(attributes=(Attribute(name="colour", words=("red", "blue")), Attribute(name="shape", words=("round",))))
WORDS = ["the", "same", "but", "in", "red", "blue", "green", "round", "square", "with", "long", "short", "sleeves", "and", "more", "less"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
OPSET = 20


def build_tiny_bundle(path: Path, *, seed: int = 0, zones: ZoneSpec | None = None) -> Path:
    """Write the bundle to `path` (a new directory) and return it. Another `seed` is another model."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for spec, nodes, weights in (_vision(rng), _query(rng), _target(rng)):
        _write_graph(path, spec, nodes, weights)
    build_tokenizer().save(str(path / "tokenizer.json"))
    write_manifest(path, zones=zones)
    return path


def write_manifest(path: Path, *, zones: ZoneSpec | None = None) -> None:
    manifest = BundleManifest(
        name="tiny",
        producer="tests",
        opset=OPSET,
        model={},
        sizes=SIZES,
        graphs=GRAPHS,
        preprocessing=PreprocessingSpec(image_size=SIZES.image_size),
        tokenizer=TokenizerSpec(max_length=16),
        vocabulary=VOCABULARY,
        zones=zones or ZoneSpec(lo=0.1, hi=0.5),
        tolerance=Tolerance(max_error=1e-4, min_cosine=0.999999, recall_points=0.1, min_overlap=0.995),
        parity=(),
        files=build_file_entries(path),
    )
    (path / MANIFEST_FILE).write_bytes(to_json(manifest))


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
    """Bag of words plus mean image token; sub-queries and weights from the words alone."""
    dim, heads = SIZES.embedding_dim, SIZES.attributes
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["words"]),  # (B, L, D)
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),  # (B, L, 1)
        helper.make_node("Mul", ["words", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], ["text"], keepdims=0),  # (B, D)
        helper.make_node("ReduceMean", ["image_tokens", "one"], ["pooled"], keepdims=0),  # (B, Hv)
        helper.make_node("MatMul", ["pooled", "w_image"], ["image"]),
        helper.make_node("Add", ["image", "text"], ["fused"]),
        helper.make_node("LpNormalization", ["fused"], ["base_query"], axis=-1, p=2),
        helper.make_node("MatMul", ["text", "w_heads"], ["heads"]),
        helper.make_node("Reshape", ["heads", "split"], ["sub_raw"]),
        helper.make_node("LpNormalization", ["sub_raw"], ["sub_queries"], axis=-1, p=2),
        helper.make_node("MatMul", ["text", "w_weights"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["attribute_weights"]),
    ]
    weights = {
        "embeddings": _weights(rng, build_tokenizer().get_vocab_size(), dim),
        "last": np.array([-1]),
        "one": np.array([1]),
        "w_image": _weights(rng, SIZES.vision_width, dim),
        "w_heads": _weights(rng, dim, heads * dim),
        "split": np.array([0, heads, dim]),
        "w_weights": _weights(rng, dim, heads),
    }
    return QUERY_ENCODER, nodes, weights


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


def _write_graph(path: Path, spec: GraphSpec, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> None:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def values(tensors: tuple) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                t.name, kinds[t.dtype], [a if isinstance(a, int) or a in DYNAMIC_AXES else getattr(SIZES, a) for a in t.axes]
            )
            for t in tensors
        ]

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, spec.name, values(spec.inputs), values(spec.outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path / spec.file))
