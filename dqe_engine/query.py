"""`Query`: one question to an index, with everything that can be asked beside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .contracts.zones import ZoneSpec
from .errors import InputError
from .index.filters import Filter, described
from .preprocessing import ImageLike

Mode = Literal["composed", "image", "text"]
MOST_RESULTS = 10_000
"""`k` and `offset` together: a page of results, not an export of the index."""
_MOST_WEIGHT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """A reference image, a modification text, or both: one question to an index.

    An image and a text are a composed query, for which models are trained. An image alone finds similar items by its target tokens. A
    text alone asks the query encoder without an image. Models are not trained for either; `SearchResult.mode` says which kind was asked
    (docs/queries.md has their figures on the demo).

    - `image`: the reference, a `Path`, bytes or a PIL image within the engine's `ImagePolicy`.
    - `reference_id`: an item of the index as the reference; its stored tokens are used and no file is read.
    - `text`: what should differ from the reference.
    - `weights`: multipliers of the predicted attribute weights, by attribute. They need a text.
    - `absolute_weights`: values that replace the predicted weights. They need a text.
    - `unlike`: ids of unwanted examples; each takes `UNLIKE` of its best token out of the query.
    - `filter`: a condition on metadata, see `compile_filter`.
    - `exclude`: ids to leave out; `exclude_reference`: also leave out the item of `reference_id`.
    - `k`: the number of hits, after the first `offset`; `minimum_score`: the least score of a hit.
    - `zones`: also sort hits into near and mid, by the bundle's bounds on Δ to the best hit, or by a `ZoneSpec` with absolute bounds.
    - `explain`: give each hit the parts of its score.

    Raises InputError if fields contradict each other. The search checks whatever needs an index or a model.
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
            if strange := [id for id in ids if not isinstance(id, str)]:
                raise InputError(f"{name}: ids are str, got {type(strange[0]).__name__}")
        for name in ("exclude_reference", "explain"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InputError(f"{name} is True or False, got {getattr(self, name)!r}")
        for name, least in (("k", 1), ("offset", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {described(value)}")
            object.__setattr__(self, name, int(value))  # NumPy's would wrap around in the sum
        if self.k + self.offset > MOST_RESULTS:
            raise InputError(
                f"k and offset come to {described(self.k + self.offset)}, at most {MOST_RESULTS} can be asked for; narrow the search "
                "by a filter"
            )
        if not isinstance(self.zones, bool | ZoneSpec):
            raise InputError(f"zones is True, False or a ZoneSpec, got {type(self.zones).__name__}")
        if isinstance(self.zones, ZoneSpec) and self.zones.bounds != "absolute":
            raise InputError(
                f"zones with {self.zones.bounds} bounds need a target, which a query has not; give absolute bounds, for Δ to its own "
                "best hit"
            )
        if self.minimum_score is not None and not _is_number(self.minimum_score):
            raise InputError(f"minimum_score is a finite number, got {described(self.minimum_score)}")
        for name in ("weights", "absolute_weights"):
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                raise InputError(f"{name}: expected a mapping from attribute to number, got {type(given).__name__}")
            for attribute, value in given.items():
                if not _is_number(value) or not 0 <= value <= _MOST_WEIGHT:
                    raise InputError(f"weight of {attribute!r}: expected a number from 0 to {_MOST_WEIGHT:.1e}, got {described(value)}")
            if given and self.text is None:
                raise InputError(f"{name}: attributes are read from the text, and there is none; pass text=..., or leave the weights out")
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
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= _MOST_WEIGHT  # larger ones may have no float
    return isinstance(value, float | np.integer | np.floating) and math.isfinite(value)
