"""The cache on disk: `ROOT/<key>/shard-NNNNN/`, each whole or absent, addressed by the images' bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqe_engine.contracts.parsing import Contract, parse_json, to_json
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import atomic_write, describe_os_error, sha256_of

from ..config import VisionConfig
from ..model import DQEModel
from .identity import feature_key

SCHEMA_VERSION = 2
"""Version 1 had no `kind`."""
META_FILE = "features.json"
SHARD_FILE = "shard.json"
TOKENS_FILE = "tokens.f16"
_READERS = 8
_OPEN_SHARDS = 256  # mapped at a time: a map keeps a file descriptor


class FeatureMeta(Versioned, frozen=True, kw_only=True):
    """`features.json`: whose tokens these are. A row is (image_tokens, width) float16, little-endian."""

    kind: Literal["image-features"] = "image-features"
    schema_version: int = SCHEMA_VERSION
    key: str
    image_tokens: int
    width: int
    vision: VisionConfig
    preprocessing: PreprocessingSpec


class ShardRecord(Contract, frozen=True):
    """`shard.json`: row i of `tokens.f16` is of the image file with the i-th SHA-256. `precision` of the tower that made it."""

    images: tuple[str, ...]
    sha256: str
    precision: str


class FeatureStore:
    """Image tokens of one tower under `root`. Readers see whole shards only; `fill` adds some.

    Raises InputError for a folder that cannot hold a cache, CheckpointError for a damaged one.
    """

    def __init__(self, root: Path, model: DQEModel) -> None:
        self.key = feature_key(model)
        self.directory = root / self.key
        self.shape = (model.sizes.image_tokens, model.sizes.vision_width)
        self.row_bytes = row_bytes(model)
        self.shards: list[str] = []
        self._records: dict[str, ShardRecord] = {}
        self._rows: dict[str, tuple[int, int]] = {}
        self._verified: set[int] = set()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="features")
        self._map = lru_cache(_OPEN_SHARDS)(self._map_shard)
        meta = FeatureMeta(
            key=self.key, image_tokens=self.shape[0], width=self.shape[1],
            vision=model.config.vision, preprocessing=model.config.preprocessing,
        )  # fmt: skip
        self._open(root, meta)
        self.refresh()

    def _open(self, root: Path, meta: FeatureMeta) -> None:
        path = self.directory / META_FILE
        try:
            if not path.exists():
                with atomic_write(path) as stream:
                    stream.write(to_json(meta))
            remedy = f"remove {self.directory}, and its images are encoded again"
            found = read_document(FeatureMeta, path, remedy=remedy, error=CheckpointError)
        except OSError as error:
            raise InputError(f"{root}: cannot hold a feature cache ({describe_os_error(error)}); choose another folder") from error
        if (found.key, found.image_tokens, found.width) != (meta.key, meta.image_tokens, meta.width):
            raise CheckpointError(f"{path}: belongs to another vision tower than its folder's name says; remove the folder")

    def refresh(self) -> None:
        """Take up shards that were added since, by this process or another. Raises CheckpointError for a damaged one."""
        for path in sorted(self.directory.glob("shard-*")):
            if path.name in self._records or not path.name.removeprefix("shard-").isdigit():
                continue
            record_path = path / SHARD_FILE
            if not record_path.is_file():
                raise CheckpointError(f"{record_path}: missing; remove {path}, and its images are encoded again")
            record = parse_json(ShardRecord, record_path.read_bytes(), where=str(record_path), error=CheckpointError)
            size, expected = _size(path / TOKENS_FILE), len(record.images) * self.row_bytes
            if size != expected:
                raise CheckpointError(
                    f"{path / TOKENS_FILE}: {size} bytes, expected {expected}; remove {path}, and its images are encoded again"
                )
            for row, digest in enumerate(record.images):
                self._rows.setdefault(digest, (len(self.shards), row))
            self.shards.append(path.name)
            self._records[path.name] = record

    def __len__(self) -> int:
        """How many images it holds."""
        return len(self._rows)

    def __contains__(self, digest: str) -> bool:
        return digest in self._rows

    def describe(self, count: int) -> str:
        """The size of `count` images, spelled out."""
        return f"{count:,} images × {self.shape[0]} × {self.shape[1]} × 2 B = {spell_bytes(count * self.row_bytes)}"

    def verify(self) -> None:
        """Read every shard against its SHA-256. Raises CheckpointError naming the first that is damaged."""
        for number in range(len(self.shards)):
            self._verify(number)

    def _verify(self, number: int) -> None:
        if number in self._verified:
            return
        path = self.directory / self.shards[number] / TOKENS_FILE
        try:
            found = sha256_of(path)
        except OSError as error:
            raise CheckpointError(describe_os_error(error, path)) from error
        if found != self._records[self.shards[number]].sha256:
            raise CheckpointError(f"{path}: damaged (SHA-256 differs); remove {path.parent}, and its images are encoded again")
        self._verified.add(number)

    def _map_shard(self, number: int) -> NDArray[np.float16]:
        self._verify(number)  # once a process, when it is first needed
        path = self.directory / self.shards[number] / TOKENS_FILE
        rows = len(self._records[self.shards[number]].images)
        return np.memmap(path, "<f2", mode="r", shape=(rows, *self.shape))

    def read(self, places: Sequence[tuple[int, int]]) -> NDArray[np.float16]:
        """(B, P, Hv) copies of the rows at (shard, row) `places`, read by threads: a disk answers many requests at once."""
        out = np.empty((len(places), *self.shape), np.float16)
        maps = {shard: self._map(shard) for shard in {shard for shard, _ in places}}

        def copy(position: int) -> None:
            shard, row = places[position]
            out[position] = maps[shard][row]

        list(self._readers.map(copy, range(len(places))))
        return out

    def places(self, digests: Sequence[str]) -> list[tuple[int, int]]:
        """Where the images are. Raises InputError where some are not here."""
        missing = sum(digest not in self._rows for digest in digests)
        if missing:
            raise InputError(f"{self.directory}: {missing} of {len(digests)} images are not in this cache; add them with dqe-data features")
        return [self._rows[digest] for digest in digests]


class StoredTokens:
    """The tokens of N images in a store, indexed like a tensor (N, P, Hv) float16 by rows; only what is asked for is read."""

    def __init__(self, store: FeatureStore, digests: Sequence[str]) -> None:
        self._store = store
        self._places = store.places(digests)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Tokens (B, P, Hv) float16 of the images at `rows` (B,), on the CPU."""
        return torch.from_numpy(self._store.read([self._places[row] for row in rows.tolist()]))


def row_bytes(model: DQEModel) -> int:
    """Bytes of one image's tokens in float16."""
    return model.sizes.image_tokens * model.sizes.vision_width * 2


def spell_bytes(count: float) -> str:
    """11.3 GB: powers of ten, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
