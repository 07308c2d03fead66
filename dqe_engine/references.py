"""What a query's reference may be. An item of the index is named by an `ItemId` and an image is an image: no string is tried as both,
so that what a request names can never become a file of the server."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError
from .preprocessing import ImageLike


@dataclass(frozen=True)
class ItemId:
    """An item of the index, as a reference."""

    id: str

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise InputError(f"an item's id is a str, got {type(self.id).__name__}")


Reference = ItemId | ImageLike


def one_reference(image: ImageLike | None, reference_id: str | None) -> Reference:
    """The one that is given. Raises InputError for none or both."""
    if (image is None) == (reference_id is None):
        given = "neither" if image is None else "both"
        raise InputError(f"a composed query needs an image and a text: pass image=... or reference_id=..., got {given}")
    if isinstance(image, ItemId):
        raise InputError(f"image is an ItemId; pass reference_id={image.id!r}")
    if reference_id is not None:
        return ItemId(reference_id)
    assert image is not None
    return image
