"""What the engine and the server ask of an index: `GalleryIndex` answers in this process, `ShardedIndex` from many, `MilvusIndex` from a
database.

What an index can do beside searching it says itself, in `lacks`: who offers an index to others asks that, and never what kind it is.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec

from .facets import Facets
from .filters import Combination, Filter
from .snapshot import IndexMatches, Item, Page
from .storage import MANIFEST_FILE, ImageStorage

Ability = Literal["list", "facets", "write", "refine", "filtered_zones"]
"""What an index may be able to do beside searching and finding items by id.

- list: `page` of a snapshot, its items in order.
- facets: `facets` of a snapshot, which metadata values how many items have.
- write: items are added, described and removed through a server, under the index's lock.
- refine: an item can be the reference of a text by its id, since image tokens are kept.
- filtered_zones: zones are counted among the items that pass a filter.
"""
ABILITIES: tuple[Ability, ...] = get_args(Ability)


@dataclass(frozen=True)
class Health:
    """What `look` found. parts: of the index, such as shards. lost: the names of those that gave no answer, and reasons: why, for each.
    answers: whether a search is answered all the same, from the others."""

    parts: int = 1
    lost: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    answers: bool = True


class SearchedSnapshot(Protocol):
    """An index at one moment; `Snapshot` says what each method does. Queries of equal ones are searched together."""

    @property
    def count(self) -> int: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def generation(self) -> str | None: ...
    def row(self, id: object, /) -> int | None: ...
    def require(self, ids: Sequence[str], /) -> None: ...
    def find(self, ids: Sequence[str], /) -> list[Item | None]: ...
    def key(self, row: int, /) -> Hashable: ...
    def target_tokens(self, row: int, /) -> NDArray[Any]: ...
    def tokens_of(self, ids: Sequence[str], /) -> list[NDArray[Any]]: ...
    def image_tokens(self, row: int, /) -> NDArray[Any]: ...
    def page(self, filter: Filter | None = None, *, after: int | None = None, limit: int = 50) -> Page: ...
    def facets(self, filter: Filter | None = None, /) -> Facets: ...
    def prepare(self, filter: Combination, /) -> None: ...
    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        filter: Combination | None = None,
        zones: ZoneSpec | None = None,
        picks: int = 0,
        threads: int = 0,
    ) -> tuple[IndexMatches, ...]: ...


class SearchedIndex(Protocol):
    """An index that an engine can search (`RetrievalEngine.attach`)."""

    @property
    def lacks(self) -> Mapping[Ability, str]:
        """The abilities that it does not have, each with what to do instead, as the end of a line."""

    @property
    def at_hand(self) -> bool:
        """Whether what it knows of an id is in this process, so that asking takes microseconds; else others are asked, and may be slow."""

    @property
    def watched(self) -> Path | None:
        """The file that is replaced when something was saved, which `refresh` then follows; None for an index without states."""

    def snapshot(self) -> SearchedSnapshot: ...
    def refresh(self) -> bool: ...
    def look(self) -> Health:
        """Ask each part whether it answers. Never raises for one that does not."""

    def require_model(self, model_hash: str, /) -> None: ...
    def close(self) -> None: ...


NO_IMAGE_TOKENS = "no image tokens are kept, so an item is no reference of a text by its id; pass its image instead"


class InProcess:
    """What a server asks of an index in a folder that this process has loaded: it can do everything."""

    at_hand = True
    image_storage: ImageStorage
    _path: Path | None

    @property
    def lacks(self) -> Mapping[Ability, str]:
        return {} if self.image_storage != "none" else {"refine": NO_IMAGE_TOKENS}

    @property
    def watched(self) -> Path | None:
        return None if self._path is None else self._path / MANIFEST_FILE

    def look(self) -> Health:
        return Health()
