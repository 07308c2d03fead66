"""Items that are to be added to an index, checked as a whole. All functions raise InputError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError

from .storage import DTYPES
from .validation import check_ids, check_no_single_str, checked_metadata
from .writer import Layout


class NewItems(NamedTuple):
    """n items in a layout's shapes and precisions: targets (n, M, D), images (n, P, Hv) where the index keeps them."""

    ids: list[str]
    targets: NDArray[Any]
    images: NDArray[Any] | None
    metadata: list[dict[str, Any] | None]
    contents: list[str | None]


def checked_items(
    layout: Layout,
    ids: Sequence[str],
    target_tokens: NDArray[Any],
    image_tokens: NDArray[Any] | None,
    metadata: Sequence[Mapping[str, Any] | None] | None,
    contents: Sequence[str | None] | None,
) -> NewItems:
    """Copies of what `GalleryIndex.add` takes."""
    check_no_single_str("ids", ids)
    ids = [str.__str__(id) if isinstance(id, str) else id for id in ids]  # of `np.str_` too, which JSON would not take
    check_ids(ids)
    targets = checked_rows("target_tokens", target_tokens, (len(ids), *layout.target_shape), DTYPES[layout.storage])
    if (image_tokens is None) != (layout.image_storage == "none"):
        kept = "keeps no image tokens" if layout.image_storage == "none" else "keeps image tokens, and none were given"
        raise InputError(f"this index {kept}; what an index keeps is chosen by image_storage when it is made")
    images = None
    if image_tokens is not None:
        images = checked_rows("image_tokens", image_tokens, (len(ids), *layout.image_shape), DTYPES[layout.image_storage])
    if metadata is not None and not isinstance(metadata, Sequence):
        raise InputError(f"metadata: expected a sequence with an object or None per id, got {type(metadata).__name__}")
    if metadata is not None and len(metadata) != len(ids):
        raise InputError(f"{len(metadata)} metadata entries for {len(ids)} ids")
    hashes = checked_contents(contents, len(ids))
    entries = [checked_metadata(id, entry) for id, entry in zip(ids, metadata or [None] * len(ids), strict=True)]
    return NewItems(ids, targets, images, entries, hashes)


def checked_contents(contents: Sequence[str | None] | None, count: int) -> list[str | None]:
    """Hashes of the images of `count` items; None, for one or for all, where they are not known."""
    given = [None] * count if contents is None else list(contents)
    if len(given) != count:
        raise InputError(f"{len(given)} content hashes for {count} ids")
    for content in given:
        if content is not None and not (isinstance(content, str) and content.isascii()):
            raise InputError(f"content hashes are ASCII strings, got {content!r}")
    return [None if content is None else str.__str__(content) for content in given]


def checked_rows(name: str, rows: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """A C-contiguous copy in `dtype`; the rows must be float32 or float16, of that shape, and finite after the cast."""
    if not isinstance(rows, np.ndarray) or rows.dtype not in (np.float32, np.float16):
        raise InputError(f"{name}: expected a float32 or float16 array, got {getattr(rows, 'dtype', type(rows).__name__)}")
    if rows.shape != shape:
        raise InputError(f"{name}: expected shape {shape}, got {rows.shape}")
    with np.errstate(over="ignore"):
        copied = np.array(rows, dtype, order="C")
    if not np.isfinite(copied).all():
        cause = "values are NaN or infinite" if not np.isfinite(rows).all() else "values are beyond float16; choose f32 storage"
        raise InputError(f"{name}: {cause}")
    return copied
