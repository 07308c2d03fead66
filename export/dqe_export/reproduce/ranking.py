"""Rankings of a view from what was encoded: by PyTorch's side in memory, by the runtime's through its index on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.files import atomic_directory
from dqe_engine.index import GalleryIndex
from dqe_engine.index.storage import MANIFEST_FILE as INDEX_MANIFEST
from dqe_engine.zones import select_zones
from dqe_training.data.queries import QuerySet
from dqe_training.evaluation.runtime import search_index

from .encoding import Encoded
from .work import Work

Rank = Callable[[QuerySet, str], NDArray[np.int64]]
"""A query set and the name of its gallery to rankings (Q, depth) of gallery positions, padded with -1."""
_ADDED_AT_ONCE = 4096


def rank_arrays(work: Work, encoded: Encoded) -> Rank:
    """Exact MaxSim over the arrays, as a checkpoint is evaluated."""
    at = {id: row for row, id in enumerate(work.ids)}

    def rank(queries: QuerySet, gallery: str) -> NDArray[np.int64]:
        whole = len(queries.gallery) == len(work.ids)  # then no copy
        targets = encoded.targets if whole else encoded.targets[[at[id] for id in queries.gallery]]
        return select_zones(encoded.queries[work.rows(queries)], targets, k=queries.depth, exclude=queries.excluded).ids

    return rank


def rank_index(work: Work, encoded: Encoded, index: GalleryIndex) -> Rank:
    """The runtime's own search, in the part of the index that is the gallery."""

    def rank(queries: QuerySet, gallery: str) -> NDArray[np.int64]:
        return search_index(index, queries, encoded.queries[work.rows(queries)], filter={gallery: True})[0]

    return rank


def write_index(path: Path, bundle: Bundle, work: Work, encoded: Encoded, galleries: Mapping[str, Sequence[str]]) -> None:
    """The index of all images, ids ascending; each item's metadata says which of the `galleries` it is in, so that one index serves all of
    them. Nothing is done where `path` is there already."""
    if (path / INDEX_MANIFEST).is_file():
        return
    members = {name: set(gallery) for name, gallery in galleries.items()}
    index = GalleryIndex.for_bundle(bundle, image_storage="none")
    for start in range(0, len(work.ids), _ADDED_AT_ONCE):
        ids = work.ids[start : start + _ADDED_AT_ONCE]
        metadata = [{"file": work.folder.names[id]} | {name: True for name, inside in members.items() if id in inside} for id in ids]
        part = slice(start, start + len(ids))
        index.add(ids, np.asarray(encoded.targets[part]), metadata=metadata)
    with atomic_directory(path) as temporary:
        index.save(temporary)
    index.close()
