"""What Milvus keeps of an item, and how items become that and are read again."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError

from .gallery import GalleryIndex
from .milvus_filters import searchable
from .pooled_bounds import MOST_NORM, bound_vectors
from .snapshot import Snapshot
from .storage import DTYPES, Storage

MOST_TEXT = 65535
"""Bytes of a text field."""
_MOST_DIMENSIONS = 32768


class Origin(msgspec.Struct, frozen=True):
    """What an entity was made from: with its position, the row of one generation of one index, which never changes."""

    model_hash: str
    target_shape: tuple[int, int]
    storage: Storage
    generation: str

    @classmethod
    def of(cls, index: GalleryIndex, now: Snapshot) -> Origin:
        assert now.generation is not None
        return cls(index.model_hash, index.target_shape, index.storage, now.generation)

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Raises ValueError."""
        return msgspec.json.decode(text, type=cls)

    def text(self) -> str:
        return msgspec.json.encode(self).decode()


def schema_of(client: Any, target_shape: tuple[int, int], index_type: str) -> tuple[Any, Any]:
    """Of a collection, and its indexes."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=MOST_TEXT)
    schema.add_field("position", DataType.INT64)  # the item's row: older ones are lower
    schema.add_field("origin", DataType.VARCHAR, max_length=1024)
    schema.add_field("tokens", DataType.VARCHAR, max_length=MOST_TEXT)  # base64 of the rows, little-endian
    schema.add_field("document", DataType.VARCHAR, max_length=MOST_TEXT)  # the metadata as it is
    schema.add_field("metadata", DataType.JSON)  # what expressions look at
    schema.add_field("bound", DataType.FLOAT_VECTOR, dim=target_shape[1] + 1)
    indexes = client.prepare_index_params()
    indexes.add_index("bound", index_type=index_type, metric_type="IP")
    return schema, indexes


def check_entity(now: Snapshot, rows: Sequence[int]) -> None:
    """Raise InputError for items that Milvus cannot hold, before any is written."""
    _, tokens, width = now.targets[0].shape
    size = -(-tokens * width * now.targets[0].dtype.itemsize // 3) * 4
    if size > MOST_TEXT or width + 1 > _MOST_DIMENSIONS:
        raise InputError(f"{tokens} tokens of {width} numbers take {size} bytes in Milvus, which holds {MOST_TEXT}; keep them in f16")
    for row in rows:
        item = now.item(row)
        if max(len(item.id.encode()), len(_document(item.metadata))) > MOST_TEXT:
            raise InputError(f"{item.id[:80]!r}: its id or metadata takes more than the {MOST_TEXT} bytes that Milvus holds")


def entities(now: Snapshot, rows: Sequence[int], origin: str) -> list[dict[str, Any]]:
    """Of these rows. Raises InputError for tokens of a length beyond `MOST_NORM`."""
    tokens = np.stack([now.target_tokens(row) for row in rows])
    if not np.linalg.norm(tokens.astype(np.float64), axis=2).max() <= MOST_NORM:
        raise InputError(f"tokens of a norm above {MOST_NORM:g}; expected embeddings, whose norm is about 1")
    made = []
    for row, own, bound in zip(rows, tokens, bound_vectors(tokens), strict=True):
        item = now.item(row)
        made.append(
            {
                "id": item.id,
                "position": row,
                "origin": origin,
                "tokens": base64.b64encode(own.tobytes()).decode(),
                "document": _document(item.metadata).decode(),
                "metadata": searchable(item.metadata),
                "bound": bound,
            }
        )
    return made


def tokens_of(entity: dict[str, Any], origin: Origin) -> NDArray[Any]:
    """(M, D), as stored."""
    return np.frombuffer(base64.b64decode(entity["tokens"]), DTYPES[origin.storage]).reshape(origin.target_shape)


def metadata_of(entity: dict[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = msgspec.json.decode(entity["document"])
    return found


def _document(metadata: dict[str, Any] | None) -> bytes:
    return msgspec.json.encode(metadata)
