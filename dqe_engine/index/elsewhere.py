"""What a command's INDEX argument may be beside the folder of an index: a sharded folder, or a file that says where an index is.

    {"kind": "index-elsewhere", "schema_version": 1, "shards": {"path": "/shared/shards", "on_loss": "partial", "name": "shop"}}
    {"kind": "index-elsewhere", "schema_version": 1, "milvus": {"uri": "http://milvus:19530", "collection": "garments"}}

Shards of such a file are actors on Ray, unless it says `"actors": false`; those of a sharded folder that is given itself are opened in this
process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal

from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import IndexFormatError, InputError
from dqe_engine.processors import available_cpus

from .searched import SearchedIndex
from .shard_files import SHARDS_FILE, read_shards
from .sharded import OnLoss, ShardedIndex
from .storage import MANIFEST_FILE


class ShardsPlace(Contract, frozen=True):
    """A folder that `dqe-index shard` or `join` made, and how its actors are to be; `open_on_ray` says what the fields mean. actors: false
    to open the shards in the process that reads this, without Ray."""

    path: str
    on_loss: OnLoss = "error"
    timeout: float = 30.0
    threads: int = 1
    name: str | None = None
    actors: bool = True

    def __post_init__(self) -> None:
        if not self.actors and (self.name is not None or self.threads != 1):
            raise ValueError('name and threads are of actors; leave them out beside "actors": false')


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


def open_elsewhere(index: Path, *, threads: int = 0, at_most: float = math.inf, spare: bool = False, niceness: int = 0) -> SearchedIndex:
    """Open what `is_elsewhere`.

    threads: of a search in this process, 0 for all. For servers: at_most, in seconds, bounds how long the file says to wait for an answer;
    spare: see `ShardedIndex` and `MilvusIndex`; niceness: see `ShardedIndex`. Raises IndexFormatError, InputError and BackendError.
    """
    place = _place(index)
    if isinstance(place, MilvusPlace):
        from .milvus import MilvusIndex

        kept: dict[str, Any] = {name: getattr(place, name) for name in ("token", "consistency", "exhaustive")}
        return MilvusIndex(_uri(index, place), place.collection, timeout=min(place.timeout, at_most), spare=spare, **kept)
    root = _root(index, place)
    options: dict[str, Any] = {"on_loss": place.on_loss, "timeout": min(place.timeout, at_most), "spare": spare}
    if place.actors:
        from .on_ray_shards import open_on_ray

        return open_on_ray(root, threads=place.threads, name=place.name, **options)
    shards = len(read_shards(root).shards)
    share = max(1, (threads or available_cpus()) // max(1, shards))  # all shards are searched at the same time
    return ShardedIndex.open_here(root, threads=share, niceness=niceness, **options)


def check_elsewhere(index: Path, model_hash: str, *, workers: int) -> None:
    """Raise, in one line, for what is wrong before anything is opened, and for what several processes cannot share. Neither shards nor
    Milvus are asked."""
    place = _place(index)
    if isinstance(place, MilvusPlace):
        uri = _uri(index, place)
        if "://" not in uri and workers > 1:
            raise InputError(f"{index}: Milvus Lite's file serves one process; leave --workers out, or run a Milvus server")
        return
    root = _root(index, place)
    shards = read_shards(root)
    if shards.model_hash != model_hash:
        raise IndexFormatError(
            f"{root} was made with model {shards.model_hash[:12]}, this bundle is {model_hash[:12]}; index the images again with it"
        )
    if place.actors and workers > 1 and not (place.name and os.environ.get("RAY_ADDRESS")):
        raise InputError(
            f"{index}: each of {workers} workers would start actors of its own; give the file a name for those that they share, and set "
            "RAY_ADDRESS"
        )


def _place(index: Path) -> ShardsPlace | MilvusPlace:
    """A sharded folder that is given itself is opened in the process."""
    if not index.is_file():
        return ShardsPlace(str(index.absolute()), actors=False)
    found = read_document(IndexElsewhere, index, remedy="docs/scaling.md shows what it holds", error=IndexFormatError)
    place = found.shards or found.milvus
    assert place is not None
    return place


def _root(index: Path, place: ShardsPlace) -> Path:
    return index.parent / place.path


def _uri(index: Path, place: MilvusPlace) -> str:
    """Of a server, or the path of Milvus Lite's file, which would be made if it were not there."""
    if "://" in place.uri:
        return place.uri
    path = index.parent / place.uri
    if not path.exists():
        raise IndexFormatError(f"{index}: milvus.uri: no such file {path}; name Milvus Lite's file, or a server as http://HOST:PORT")
    return str(path)
