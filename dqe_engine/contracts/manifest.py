"""The bundle manifest: `manifest.json`, which names, sizes and hashes everything in a bundle that is loaded."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

from .graphs import ATTRIBUTE_HEADS, GraphSizes, GraphSpec
from .parsing import Contract, to_json
from .preprocessing import PreprocessingSpec
from .provenance import Provenance
from .tokenizer import TokenizerSpec
from .versioned import Versioned
from .vocabulary import AttributeVocabulary
from .zones import ZoneSpec

Precision = Literal["float32", "float16", "int8", "int8-static"]
PRECISIONS: dict[str, Precision] = {"f32": "float32", "f16": "float16", "int8": "int8", "int8-static": "int8-static"}
"""By the names that commands take."""
Target = Literal["cpu", "cuda"]
"""What the form of a bundle's graphs is for. Either runs anywhere; they differ in the order of products, and in speed."""
Composition = Literal["trained", "added"]
SCHEMA_VERSION, OLDEST_SCHEMA = 7, 3
"""Written, and read: up to version 6 no model was imported, and no tokenizer had `captions`; up to 5 there was no `kind`; those of
version 4 are for CPUs and do not say so; those of version 3 lack what is None here, and report files are among their files."""
ROW_INT8_SCHEMA = 4
"""The first whose int8 graphs scale every row by itself."""
MANIFEST_FILE = "manifest.json"
HEADS_FILE = "heads.json"
COMPOSED_QUERY = "composed_query"
"""In a manifest's `parity`: query encoder and attribute heads one after the other, as if they were one graph."""
REPORT_FILES = ("report.json", "report.html")
"""What export says of the bundle, timings included: no part of what the bundle is, so they are neither listed nor verified."""


class FileEntry(Contract, frozen=True):
    """One file of the bundle: path relative to it, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


class Tolerance(Contract, frozen=True):
    """What a precision is held to. `max_error` of any element and `mean_error` over all, relative to the largest reference value where
    that exceeds 1; `min_cosine` of any vector of an output with PyTorch's; on an evaluation set, `recall_points` by which recall@10 may
    fall, in percentage points, and `min_overlap` of the first ten. `norm`: by how much the length of a vector of unit norm may be off.
    `batch_dependence`: how far (as `max_error`) an answer may move with what else is in its batch, and with padding.

    None: bundles of schema version 3 were not held to it."""

    max_error: float
    min_cosine: float
    recall_points: float
    min_overlap: float
    mean_error: float | None = None
    norm: float | None = None
    batch_dependence: float | None = None


class OutputParity(Contract, frozen=True):
    """One output against PyTorch: errors as in `Tolerance`, cosines over its vectors (its last axis)."""

    max_error: float
    mean_error: float
    cosine_min: float
    cosine_p1: float
    cosine_mean: float


class GraphParity(Contract, frozen=True):
    """One graph against PyTorch over the validated shapes, none of which was traced, by output. `batch_dependence`: the largest
    difference of an answer in a batch, padded, or both, from the same one alone (see `Tolerance`); None where it was not measured."""

    graph: str
    outputs: dict[str, OutputParity]
    shapes: tuple[dict[str, int], ...]
    batch_dependence: float | None = None


class RetrievalParity(Contract, frozen=True):
    """The whole bundle, by the runtime, against the checkpoint in PyTorch on an evaluation set.

    Recalls are shares. `difference` is bundle minus PyTorch in percentage points with its 95 % interval over
    queries; `allowed` what it may fall by, one query where that is more than the tolerance; `top10_overlap` the mean share of
    PyTorch's first ten that are among the bundle's.
    """

    data: str
    queries: int
    gallery: int
    pytorch_recall_at_10: float
    bundle_recall_at_10: float
    difference: float
    interval: tuple[float, float]
    allowed: float
    top10_overlap: float


class BundleManifest(Versioned, frozen=True, kw_only=True):
    """`model` is the training configuration's model section, for the record and for `composition`; the runtime reads `sizes`.

    `encoder_hash`: identity of what attribute heads were trained on: the model but for them, preprocessing, tokenizer. `imported`: where
    the weights, or those that training began with, come from, if not from training here.
    """

    OLDEST_SCHEMA: ClassVar[int] = OLDEST_SCHEMA

    kind: Literal["bundle"] = "bundle"
    schema_version: int = SCHEMA_VERSION
    name: str
    producer: str
    precision: Precision = "float32"
    target: Target = "cpu"
    opset: int
    model: dict[str, Any]
    encoder_hash: str
    sizes: GraphSizes
    graphs: tuple[GraphSpec, ...]
    preprocessing: PreprocessingSpec
    tokenizer: TokenizerSpec
    vocabulary: AttributeVocabulary
    zones: ZoneSpec
    tolerance: Tolerance
    parity: tuple[GraphParity, ...]
    retrieval: RetrievalParity | None = None
    imported: Provenance | None = None
    files: tuple[FileEntry, ...]

    @property
    def composition(self) -> Composition:
        """How the model makes one query of an image and a text: "trained" to, or "added", which is the sum of their embeddings."""
        return "added" if self.model.get("base_query") == "zero_shot" else "trained"

    @property
    def model_hash(self) -> str:
        """Identity of what the embeddings mean: an index made with one bundle is refused by another's hash.

        Attribute heads have no part in it. They move queries among the same embeddings, and may be replaced under an index. The files
        are: a bundle of the same checkpoint in another precision, or for another target, is another model to an index.
        """
        heads = graph_files(ATTRIBUTE_HEADS)
        files = tuple(f for f in self.files if not f.path.startswith("tensorrt/") and f.path not in heads)
        return _digest((self.preprocessing, self.tokenizer, files))

    def graph_hash(self, graph: GraphSpec) -> str:
        """Identity of one graph's file and weights: what a TensorRT engine is built from."""
        return _digest([f.sha256 for f in self.files if f.path in graph_files(graph)])


class HeadsManifest(Versioned, frozen=True, kw_only=True):
    """`heads.json`, beside the graph of the attribute heads alone: what a bundle takes over, and what it must be to fit.

    `sizes`, `precision` and `encoder_hash` are those of the bundles that can take them, but for the number of attributes.
    """

    OLDEST_SCHEMA: ClassVar[int] = OLDEST_SCHEMA

    kind: Literal["attribute-heads"] = "attribute-heads"
    schema_version: int = SCHEMA_VERSION
    producer: str
    precision: Precision
    opset: int
    encoder_hash: str
    sizes: GraphSizes
    vocabulary: AttributeVocabulary
    vocabulary_hash: str
    zones: ZoneSpec
    tolerance: Tolerance
    parity: GraphParity
    files: tuple[FileEntry, ...]


def graph_files(graph: GraphSpec) -> tuple[str, str]:
    """A graph's file, and that of its weights where they are too large for it."""
    return graph.file, f"{graph.file}.data"


def _digest(value: Any) -> str:
    return hashlib.sha256(to_json(value)).hexdigest()[:32]
