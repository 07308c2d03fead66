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
    """The steps of one search. Each step is a query with its result, and is made from the step before. Use one dialogue in one thread.

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
        """Go on from a hit, with a text that says what else should differ. The hit is the best one, or `chosen`, and is the new reference.

        Weights start anew, because they belonged to the old text. Filter, examples and the number of hits stay. Raises InputError if the
        last step has no hits."""
        if chosen is None:
            if not self.result.hits:
                raise InputError("the last step has no hits to go on from; go back, or name an item with chosen=...")
            chosen = self.result.hits[0].id
        return self._ask(replace(self.query, text=text, image=None, reference_id=chosen, weights={}, absolute_weights={}, offset=0))

    def unlike(self, *ids: str) -> SearchResult:
        """Ask the same question again, with these items as unwanted examples."""
        return self._ask(replace(self.query, unlike=tuple(dict.fromkeys((*self.query.unlike, *ids))), offset=0))

    def weigh(self, weights: Mapping[str, float]) -> SearchResult:
        """Ask the same question again, with these multipliers of attribute weights in addition to the earlier ones."""
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
