"""What `/v1` takes and gives, as types: requests are read by them, answers written, and OpenAPI's schemas made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from dqe_engine.contracts.manifest import Composition
from dqe_engine.errors import InputError
from dqe_engine.index.facets import Facet
from dqe_engine.index.searched import ABILITIES, Ability
from dqe_engine.query import MOST_RESULTS, Query
from dqe_engine.results import IndexState

from .problems import Problem

MOST_TEXT, MOST_ID, MOST_IDS, MOST_ATTRIBUTES = 10_000, 2_000, 1_000, 100
MOST_EXPLAINED = 200
MOST_FILTER_KEYS, MOST_FILTER_VALUES = 200, 10_000
"""Keys of a filter's objects, all together, and elements of its lists. Of 100,000 items, a condition takes up to a millisecond."""
_MOST_WEIGHT = 1e6

Id = Annotated[str, Meta(min_length=1, max_length=MOST_ID, examples=["gallery/000001.jpg"])]
Ids = Annotated[tuple[Id, ...], Meta(max_length=MOST_IDS)]
Weights = Annotated[
    dict[Annotated[str, Meta(max_length=200)], Annotated[float, Meta(ge=0, le=_MOST_WEIGHT)]], Meta(max_length=MOST_ATTRIBUTES)
]
Metadata = dict[str, Any] | None


class SearchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question: `dqe_engine.Query` as JSON. The reference image is `reference_id`, or the part `image` of a multipart request."""

    reference_id: Id | None = None
    text: Annotated[str, Meta(max_length=MOST_TEXT, examples=["is red and has stripes"])] | None = None
    weights: Weights = msgspec.field(default_factory=dict)
    absolute_weights: Weights = msgspec.field(default_factory=dict)
    unlike: Ids = ()
    filter: Annotated[dict[str, Any], Meta(examples=[{"colour": "red", "price": {"<": 20}}])] | None = None
    exclude: Ids = ()
    exclude_reference: bool = True
    k: Annotated[int, Meta(ge=1, le=MOST_RESULTS)] = 10
    offset: Annotated[int, Meta(ge=0, le=MOST_RESULTS)] = 0
    minimum_score: Annotated[float, Meta(ge=-10, le=10)] | None = None
    zones: bool = False
    explain: bool = False

    def query(self, image: bytes | None = None) -> Query:
        """Raises InputError where it contradicts itself, or asks too much, and names the fields as the engine does."""
        check_filter(self.filter)
        if self.explain and self.k > MOST_EXPLAINED:
            raise InputError(
                f"explain: at most {MOST_EXPLAINED} hits are explained at once, k is {self.k}; ask for fewer, or for pages by offset"
            )
        return Query(image=image, **{name: getattr(self, name) for name in self.__struct_fields__})


class ItemResponse(msgspec.Struct, frozen=True):
    """content: the hash of the image's bytes, where it is known."""

    id: str
    metadata: Metadata
    content: str | None


class FacetsResponse(msgspec.Struct, frozen=True):
    """total: items that pass the filter; keys: what their metadata holds, see `Facet`."""

    total: int
    keys: tuple[Facet, ...]


class ItemsResponse(msgspec.Struct, frozen=True):
    """A page of items, the oldest first. `next`: `after` of the next page; null on the last one. `total`: items that pass the filter."""

    items: tuple[ItemResponse, ...]
    next: str | None
    total: int


class NewItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the image of a multipart request is to be known by. `replace`: also where there is an item of this id."""

    id: Id
    metadata: Metadata = None
    replace: bool = False


class MetadataChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """It takes the place of what the item had, as a whole."""

    metadata: Metadata


class WrittenResponse(msgspec.Struct, frozen=True):
    """On the disk, and part of what is searched from `revision` on."""

    id: str
    revision: str
    content: str | None = None


class RemovedResponse(msgspec.Struct, frozen=True):
    id: str
    revision: str


class SessionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Annotated[str, Meta(max_length=1_024)]


class Model(msgspec.Struct, frozen=True):
    """composition: whether the model was trained to make one query of an image and a text, or adds their embeddings."""

    name: str
    hash: str
    composition: Composition = "trained"


class AttributeValues(msgspec.Struct, frozen=True):
    name: str
    values: tuple[str, ...]


class ImageLimits(msgspec.Struct, frozen=True):
    formats: tuple[str, ...]
    max_bytes: int
    max_pixels: int


class Limits(msgspec.Struct, frozen=True):
    """k: hits, with offset; explained: hits where `explain` is asked for; ids: in a list; filter_keys, filter_values: of one filter."""

    k: int
    explained: int
    text: int
    ids: int
    filter_keys: int
    filter_values: int
    body_bytes: int


class VocabularyResponse(msgspec.Struct, frozen=True):
    """What one can ask here: attributes and their values, images that are taken, limits, and whether one may write or needs a key. offers:
    what the index can do beside searching, see `Ability`; `write` alone does not say that there are keys for it, as `writes` does."""

    model: Model
    attributes: tuple[AttributeValues, ...]
    image: ImageLimits
    limits: Limits
    index: IndexState
    writes: bool
    keys: bool
    zones: bool
    offers: tuple[Ability, ...] = ABILITIES


class ReadyResponse(msgspec.Struct, frozen=True):
    """following: whether the last look at the index's files went well; where not, answers are those of the last good one. lost: parts of
    the index that gave no answer when they were last asked, and whose items answers lack."""

    status: Literal["ready"]
    items: int
    revision: str | None
    following: bool
    lost: tuple[str, ...] = ()


class Indexing(msgspec.Struct, frozen=True):
    """An index that is being brought up to date with its photos. `done` of `total`: images. `message`: for people. `skipped`:
    images that were left out, by reason."""

    state: Literal["comparing", "indexing", "done", "failed"]
    done: int
    total: int
    message: str
    skipped: dict[str, int]


class StatusResponse(msgspec.Struct, frozen=True):
    indexing: Indexing | None
    items: int
    revision: str | None


class HealthResponse(msgspec.Struct, frozen=True):
    status: Literal["ok"]


class ErrorBody(msgspec.Struct, frozen=True):
    """code: for programs; message: for people, one line; request_id: for who runs this."""

    code: str
    message: str
    request_id: str


class ErrorResponse(msgspec.Struct, frozen=True):
    error: ErrorBody


T = TypeVar("T")


def check_filter(filter: Mapping[str, Any] | None) -> None:
    """Raises InputError for one that would take seconds: each condition is tested on every item, and each value is looked up."""
    keys, values, stack = 0, 0, [filter]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            keys += len(node)
            stack += node.values()
        elif isinstance(node, list):
            values += len(node)
            stack += [part for part in node if isinstance(part, dict | list)]
        if keys > MOST_FILTER_KEYS or values > MOST_FILTER_VALUES:
            most = f"{MOST_FILTER_KEYS} conditions or {MOST_FILTER_VALUES:,} listed values"
            raise InputError(f"filter: more than {most}; split the search, or give the items one metadata key for this condition")


def read_json(data: bytes | str, type: type[T]) -> T:
    """Raises Problem: 400 for what is no JSON, 422 for what is not of this type."""
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid_request", f"{error}; see /openapi.json for what is expected") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "invalid_json", f"the body is not valid JSON: {error}; send one JSON object in UTF-8") from error
