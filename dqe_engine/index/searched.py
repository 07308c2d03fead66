"""What the engine asks of an index: `GalleryIndex` answers in this process, `ShardedIndex` from many, `MilvusIndex` from a database."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec

from .filters import Combination
from .snapshot import IndexMatches


class SearchedSnapshot(Protocol):
    """An index at one moment; `Snapshot` says what each method does. Queries of equal ones are searched together."""

    @property
    def count(self) -> int: ...
    @property
    def revision(self) -> str | None: ...
    def row(self, id: object, /) -> int | None: ...
    def existing(self, id: str, /) -> int: ...
    def key(self, row: int, /) -> Hashable: ...
    def target_tokens(self, row: int, /) -> NDArray[Any]: ...
    def image_tokens(self, row: int, /) -> NDArray[Any]: ...
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

    def snapshot(self) -> SearchedSnapshot: ...
    def require_model(self, model_hash: str, /) -> None: ...
    def close(self) -> None: ...
