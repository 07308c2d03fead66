"""Torch-free runtime for composed image retrieval: load a bundle, index images, search by reference image and text."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .contracts.zones import ZoneSpec as ZoneSpec
    from .engine import RetrievalEngine as RetrievalEngine
    from .image_policy import ImagePolicy as ImagePolicy
    from .index import GalleryIndex as GalleryIndex
    from .query import Query as Query
    from .results import SearchResult as SearchResult
    from .zones import Screen as Screen
    from .zones import select_zones as select_zones

__version__ = "0.2.0"

# Loaded on first use, so that `import dqe_engine` pulls in neither ONNX Runtime nor Pillow.
_LAZY = {
    "Bundle": ".bundle",
    "GalleryIndex": ".index",
    "ImagePolicy": ".image_policy",
    "Query": ".query",
    "RetrievalEngine": ".engine",
    "SearchResult": ".results",
    "Screen": ".zones",
    "ZoneSpec": ".contracts.zones",
    "select_zones": ".zones",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
