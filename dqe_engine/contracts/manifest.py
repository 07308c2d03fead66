"""The bundle manifest: `manifest.json`, which names, sizes and hashes everything else in a bundle."""

from __future__ import annotations

import hashlib
from typing import Any

from .graphs import GraphSizes, GraphSpec
from .parsing import Contract, to_json
from .preprocessing import PreprocessingSpec
from .tokenizer import TokenizerSpec
from .vocabulary import AttributeVocabulary
from .zones import ZoneSpec

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
REPORT_FILES = ("report.json", "report.html")
"""What export says of the bundle, timings included: no part of what the bundle is."""


class FileEntry(Contract, frozen=True):
    """One file of the bundle: path relative to it, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


class Tolerance(Contract, frozen=True):
    """What a precision is held to. `max_error` of any element, relative to the largest reference value where that exceeds 1;
    `min_cosine` of any vector of an output with PyTorch's; on an evaluation set, `recall_points` by which recall@10 may fall, in
    percentage points, and `min_overlap` of the first ten."""

    max_error: float
    min_cosine: float
    recall_points: float
    min_overlap: float


class OutputParity(Contract, frozen=True):
    """One output against PyTorch: errors as in `Tolerance`, cosines over its vectors (its last axis)."""

    max_error: float
    mean_error: float
    cosine_min: float
    cosine_p1: float
    cosine_mean: float


class GraphParity(Contract, frozen=True):
    """One graph against PyTorch over the validated shapes, none of which was traced, by output."""

    graph: str
    outputs: dict[str, OutputParity]
    shapes: tuple[dict[str, int], ...]


class RetrievalParity(Contract, frozen=True):
    """The whole bundle, by the runtime, against the checkpoint in PyTorch on an evaluation set.

    Recalls are shares. `difference` is bundle minus PyTorch in percentage points with its 95 % bootstrap interval over
    queries; `top10_overlap` the mean share of PyTorch's first ten that are among the bundle's.
    """

    data: str
    queries: int
    gallery: int
    pytorch_recall_at_10: float
    bundle_recall_at_10: float
    difference: float
    interval: tuple[float, float]
    top10_overlap: float


class BundleManifest(Contract, frozen=True, kw_only=True):
    """`model` is the training configuration's model section, for the record; the runtime reads `sizes`."""

    schema_version: int = SCHEMA_VERSION
    name: str
    producer: str
    precision: str = "float32"
    opset: int
    model: dict[str, Any]
    sizes: GraphSizes
    graphs: tuple[GraphSpec, ...]
    preprocessing: PreprocessingSpec
    tokenizer: TokenizerSpec
    vocabulary: AttributeVocabulary
    zones: ZoneSpec
    tolerance: Tolerance
    parity: tuple[GraphParity, ...]
    retrieval: RetrievalParity | None = None
    files: tuple[FileEntry, ...]

    @property
    def model_hash(self) -> str:
        """Identity of what the embeddings mean: an index made with one bundle is refused by another's hash."""
        files = tuple(f for f in self.files if not f.path.startswith("tensorrt/") and f.path not in REPORT_FILES)
        kept = (self.sizes, self.preprocessing, self.tokenizer, files)
        return hashlib.sha256(to_json(kept)).hexdigest()[:32]
