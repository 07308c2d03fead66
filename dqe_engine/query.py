"""`Query`: one question to an index, with everything that can be asked beside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .contracts.zones import ZoneSpec
from .errors import InputError
from .index.filters import Filter
from .preprocessing import ImageLike

Mode = Literal["composed", "image", "text"]
MOST_RESULTS = 10_000
"""`k` and `offset` together: a page of results, not an export of the index."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """A reference image, and how what is wanted differs from it.

    image: a `Path`, bytes or a PIL image, within the engine's `ImagePolicy`; or reference_id: an item of the index, whose stored tokens
    are used (no file is looked at, whatever the id is). text: the modification. Both: a composed query, what the model was trained for.
    An image alone asks for similar items, by the tokens that the gallery is searched by; a text alone asks the query encoder without an
    image. Neither was trained: `SearchResult.mode` says which it was (docs/queries.md has what they give on the demo).

    weights: multipliers of the predicted attribute weights, by attribute; absolute_weights: values that take their place.
    unlike: ids of items whose like is not wanted; each takes `UNLIKE` of its best token out of the query.
    filter: on metadata, see `compile_filter`. exclude: ids to leave out. exclude_reference: leave out the item of `reference_id`.
    k: how many hits, after the first `offset`; minimum_score: only hits that score as much. zones: also tell near from mid, by the bundle's
    bounds on Δ to the best hit or by other absolute ones. explain: say of each hit what its score is made of.

    Raises InputError where it contradicts itself; what only an index or a model can tell is checked by the search.
    """

    text: str | None = None
    image: ImageLike | None = None
    reference_id: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    absolute_weights: Mapping[str, float] = field(default_factory=dict)
    unlike: Collection[str] = ()
    filter: Filter | None = None
    exclude: Collection[str] = ()
    exclude_reference: bool = True
    k: int = 10
    offset: int = 0
    minimum_score: float | None = None
    zones: bool | ZoneSpec = False
    explain: bool = False

    def __post_init__(self) -> None:
        if self.image is not None and self.reference_id is not None:
            raise InputError("a query has one reference: pass image=... or reference_id=..., got both")
        if self.image is None and self.reference_id is None and self.text is None:
            raise InputError("a query needs an image, a text, or both: pass text=... and image=... or reference_id=..., got neither")
        if self.reference_id is not None and not isinstance(self.reference_id, str):
            raise InputError(f"reference_id is a str, got {type(self.reference_id).__name__}")
        if self.text is not None and not isinstance(self.text, str):
            raise InputError(f"text is a str, got {type(self.text).__name__}")
        for name in ("unlike", "exclude"):
            ids = getattr(self, name)
            if isinstance(ids, str | bytes) or not isinstance(ids, Collection):
                raise InputError(f"{name}: expected a collection of ids, got {type(ids).__name__}; wrap it in a list")
            if odd := [id for id in ids if not isinstance(id, str)]:
                raise InputError(f"{name}: ids are strings, got {odd[0]!r}")
        for name, least in (("k", 1), ("offset", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.k + self.offset > MOST_RESULTS:
            raise InputError(
                f"k and offset come to {self.k + self.offset}, at most {MOST_RESULTS} can be asked for; narrow the query by a filter"
            )
        if not isinstance(self.zones, bool | ZoneSpec):
            raise InputError(f"zones is True, False or a ZoneSpec, got {type(self.zones).__name__}")
        if self.minimum_score is not None and not _is_number(self.minimum_score):
            raise InputError(f"minimum_score is a finite number, got {self.minimum_score!r}")
        for name in ("weights", "absolute_weights"):
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                raise InputError(f"{name}: expected a mapping from attribute to number, got {type(given).__name__}")
            for attribute, value in given.items():
                if not _is_number(value) or value < 0:
                    raise InputError(f"weight of {attribute!r}: expected a finite number of at least 0, got {value!r}")
        if both := self.weights.keys() & self.absolute_weights.keys():
            raise InputError(f"weight of {min(both)!r}: give a multiplier (weights) or a value (absolute_weights), not both")

    @property
    def mode(self) -> Mode:
        if self.text is None:
            return "image"
        return "text" if self.image is None and self.reference_id is None else "composed"

    def excluded(self) -> set[str]:
        """All ids that are no candidates."""
        left_out = {*self.exclude, *self.unlike}
        if self.exclude_reference and self.reference_id is not None:
            left_out.add(self.reference_id)
        return left_out


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
