"""The weights that a run is given: a published file, a checkpoint or a bundle; what is known of them before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.manifest import MANIFEST_FILE, PRECISIONS
from dqe_engine.contracts.provenance import Provenance
from dqe_engine.contracts.vocabulary import NO_ATTRIBUTES, AttributeVocabulary
from dqe_engine.errors import InputError
from dqe_training.checkpointing.meta import META, VOCABULARY, parse_meta
from dqe_training.config.schema import ModelConfig
from dqe_training.data.triplets import read_vocabulary
from dqe_training.importing import ImportOptions, plan_import
from dqe_training.model import DQEModel

from .keys import content_key, key_of, software

ROWS = {
    "pytorch": "PyTorch float32", "f32": "runtime float32", "int8": "runtime int8", "f16": "runtime float16",
    "int8-static": "runtime int8-static",
}  # fmt: skip
"""What a table's rows are called."""
_SHORT = {precision: row for row, precision in PRECISIONS.items()}


@dataclass(frozen=True)
class Source:
    """`layout`: that of the published file, None for a model trained here. `tower`: "L" or "g". `shape`: (M, D) of target tokens.
    `parameters`: 0 for a bundle, which has them already. `bytes`: of the file. `rows`: what can be measured."""

    kind: Literal["published", "checkpoint", "bundle"]
    path: Path
    layout: str | None
    tower: str
    shape: tuple[int, int]
    parameters: int
    bytes: int
    rows: tuple[str, ...]

    @property
    def stem(self) -> str:
        return self.path.name.split(".")[0] or "weights"


def open_source(path: Path, options: ImportOptions) -> Source:
    """Checked to the last key and shape, without reading a value. Raises InputError, CheckpointError or BundleError."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give published weights, a checkpoint (dqe-train, dqe-import) or a bundle (dqe-export)")
    if (path / MANIFEST_FILE).is_file() or (path / META).is_file():
        if options != ImportOptions():
            raise InputError(f"{path}: is no published file; leave out --format, --tower, --tokenizer and the options of heads")
        return _bundle(path) if (path / MANIFEST_FILE).is_file() else _checkpoint(path)
    plan = plan_import(path, options)
    sizes = sum(os.stat(file).st_size for file in plan.files)
    return _described("published", path, plan.layout.name, plan.model, NO_ATTRIBUTES, sizes)


def _checkpoint(path: Path) -> Source:
    meta = parse_meta(path)
    layout = None if meta.imported is None else meta.imported.format
    return _described("checkpoint", path, layout, meta.config.model, read_vocabulary(path / VOCABULARY), 0)


def _described(
    kind: Literal["published", "checkpoint"],
    path: Path,
    layout: str | None,
    config: ModelConfig,
    vocabulary: AttributeVocabulary,
    size: int,
) -> Source:
    with torch.device("meta"):
        model = DQEModel(config, vocabulary, 1)  # where the words are the tokenizer's, they are left out of this estimate
    parameters = sum(value.numel() for value in model.state_dict().values())
    shape = (model.sizes.target_tokens, model.sizes.embedding_dim)
    return Source(kind, path, layout, _tower(config.vision.pre_norm), shape, parameters, size, ("pytorch", "f32", "int8"))


def _bundle(path: Path) -> Source:
    manifest = Bundle.load(path, verify=False).manifest
    layout = None if manifest.imported is None else manifest.imported.format
    pre_norm = bool(manifest.model.get("vision", {}).get("pre_norm"))
    row = _SHORT[manifest.precision]
    return Source("bundle", path, layout, _tower(pre_norm), (manifest.sizes.target_tokens, manifest.sizes.embedding_dim), 0, 0, (row,))


def _tower(pre_norm: bool) -> str:
    """Of the two published towers, CLIP's has a LayerNorm before its first block."""
    return "L" if pre_norm else "g"


def source_key(source: Source, options: ImportOptions, advance: Callable[[str], None] = lambda text: None) -> str:
    """Changes with what an import would write. Reads published files whole. Raises InputError."""
    if source.kind != "published":
        return content_key(source.path / (MANIFEST_FILE if source.kind == "bundle" else META))
    advance(f"hashing {source.path.name}")
    files = [None if path is None else content_key(path) for path in (source.path, options.tower)]
    local = Path(os.path.expanduser(options.tokenizer)) if options.tokenizer else None
    tokenizer = content_key(local) if local is not None and local.exists() else options.tokenizer
    named = [options.layout, options.vision_heads, options.qformer_heads]
    return key_of("import", files, tokenizer, named, software())


def provenance(path: Path) -> Provenance | None:
    """Of a checkpoint or a bundle."""
    if (path / MANIFEST_FILE).is_file():
        return Bundle.load(path, verify=False).manifest.imported
    return parse_meta(path).imported
