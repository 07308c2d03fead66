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

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"


class FileEntry(Contract, frozen=True):
    """One file of the bundle: path relative to it, bytes, SHA-256."""

    path: str
    size: int
    sha256: str


class GraphParity(Contract, frozen=True):
    """Largest difference from PyTorch over the validated shapes, per output, and the tolerance it was held to."""

    graph: str
    max_abs_error: dict[str, float]
    tolerance: float
    shapes: tuple[dict[str, int], ...]


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
    parity: tuple[GraphParity, ...]
    files: tuple[FileEntry, ...]

    @property
    def model_hash(self) -> str:
        """Identity of what the embeddings mean: an index made with one bundle is refused by another's hash."""
        kept = (self.sizes, self.preprocessing, self.tokenizer, tuple(f for f in self.files if not f.path.startswith("tensorrt/")))
        return hashlib.sha256(to_json(kept)).hexdigest()[:32]
