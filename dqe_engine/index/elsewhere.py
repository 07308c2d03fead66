"""What a command's INDEX argument may be beside the folder of an index: a sharded folder, or a file that says where an index is.

    {"kind": "index-elsewhere", "schema_version": 1, "shards": {"path": "/shared/shards", "on_loss": "partial", "name": "shop"}}
    {"kind": "index-elsewhere", "schema_version": 1, "milvus": {"uri": "http://milvus:19530", "collection": "garments"}}

Shards of such a file are actors on Ray; those of a sharded folder that is given itself are opened in this process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import IndexFormatError

from .searched import SearchedIndex
from .shard_files import SHARDS_FILE
from .sharded import OnLoss, ShardedIndex
from .storage import MANIFEST_FILE


class ShardsPlace(Contract, frozen=True):
    """A folder that `dqe-index shard` or `join` made, and how its actors are to be; `open_on_ray` says what the fields mean."""

    path: str
    on_loss: OnLoss = "error"
    timeout: float = 30.0
    threads: int = 1
    name: str | None = None


class MilvusPlace(Contract, frozen=True):
    """A collection that `MilvusIndex.create` made; `MilvusIndex` says what the fields mean. token: in a file for your eyes alone."""

    uri: str
    collection: str
    token: str = ""
    timeout: float = 30.0
    consistency: Literal["Strong", "Bounded", "Eventually"] = "Strong"
    exhaustive: bool | None = None


class IndexElsewhere(Versioned, frozen=True, kw_only=True):
    """One of the two places. A relative path is from the folder of the file."""

    kind: Literal["index-elsewhere"] = "index-elsewhere"
    schema_version: int = 1
    shards: ShardsPlace | None = None
    milvus: MilvusPlace | None = None

    def __post_init__(self) -> None:
        if (self.shards is None) == (self.milvus is None):
            raise ValueError(f"expected either shards or milvus, got {'both' if self.shards else 'neither'}")


def is_elsewhere(index: Path) -> bool:
    """Whether INDEX is something that `open_elsewhere` opens; else it is, or should be, the folder of an index."""
    return index.is_file() or ((index / SHARDS_FILE).is_file() and not (index / MANIFEST_FILE).is_file())


def open_elsewhere(index: Path, *, threads: int = 0) -> SearchedIndex:
    """Open what `is_elsewhere`. `threads`: of a search in this process, 0 for all. Raises IndexFormatError, InputError and BackendError."""
    if not index.is_file():
        return ShardedIndex.open_here(index, threads=threads)
    place = read_document(IndexElsewhere, index, remedy="docs/scaling.md shows what it holds", error=IndexFormatError)
    if place.shards is not None:
        from .on_ray_shards import open_on_ray

        shards = msgspec.structs.asdict(place.shards)
        return open_on_ray(index.parent / shards.pop("path"), **shards)
    assert place.milvus is not None
    from .milvus import MilvusIndex

    milvus = msgspec.structs.asdict(place.milvus)
    if "://" not in milvus["uri"]:
        path = index.parent / milvus["uri"]
        if not path.exists():  # else Milvus Lite would make it
            raise IndexFormatError(f"{index}: milvus.uri: no such file {path}; name Milvus Lite's file, or a server as http://HOST:PORT")
        milvus["uri"] = str(path)
    return MilvusIndex(milvus.pop("uri"), milvus.pop("collection"), **milvus)
