"""`Dialogue`: a search that goes on from its own hits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from .errors import InputError
from .query import Query
from .results import SearchResult


class Searching(Protocol):
    """A `RetrievalEngine`, as far as a dialogue needs it."""

    def search(self, query: Query, /) -> SearchResult: ...


class Dialogue:
    """Steps of one search: each is a query and its result, and made from the one before. One caller's, not for several threads.

    >>> dialogue = engine.dialogue(Query(image=Path("photo.jpg"), text="in red"))
    >>> dialogue.refine("now without dots")       # from the best hit, or chosen="sku-7"
    >>> dialogue.unlike("sku-12")                 # and nothing like that one
    >>> dialogue.back()
    """

    def __init__(self, engine: Searching, query: Query) -> None:
        """Asks at once. Raises what `RetrievalEngine.search` does."""
        self._engine = engine
        self.steps: list[tuple[Query, SearchResult]] = []
        self._ask(query)

    @property
    def query(self) -> Query:
        return self.steps[-1][0]

    @property
    def result(self) -> SearchResult:
        return self.steps[-1][1]

    def refine(self, text: str, *, chosen: str | None = None) -> SearchResult:
        """What else should differ from a hit, the best one unless `chosen`: it is the reference from now on. Weights start anew, as they
        were of the other text; filter, examples and the number of hits stay. Raises InputError where there is no hit to go on from."""
        if chosen is None:
            if not self.result.hits:
                raise InputError("the last step has no hits to go on from; go back, or name an item with chosen=...")
            chosen = self.result.hits[0].id
        return self._ask(replace(self.query, text=text, image=None, reference_id=chosen, weights={}, absolute_weights={}, offset=0))

    def unlike(self, *ids: str) -> SearchResult:
        """The same question without the like of these items."""
        return self._ask(replace(self.query, unlike=tuple(dict.fromkeys((*self.query.unlike, *ids))), offset=0))

    def weigh(self, weights: Mapping[str, float]) -> SearchResult:
        """The same question with these multipliers of attribute weights, beside those of before."""
        return self._ask(replace(self.query, weights={**self.query.weights, **weights}, offset=0))

    def back(self) -> SearchResult:
        """Undo the last step. Raises InputError at the first."""
        if len(self.steps) == 1:
            raise InputError("this is the first step; there is none to go back to")
        self.steps.pop()
        return self.result

    def _ask(self, query: Query) -> SearchResult:
        result = self._engine.search(query)
        self.steps.append((query, result))
        return result
