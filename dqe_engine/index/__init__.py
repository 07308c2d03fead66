"""The gallery index: string ids, target tokens, cached image tokens and metadata; exact search; crash-safe on disk."""

from .gallery import GalleryIndex, IndexStats
from .snapshot import IndexMatches, Item, Match, Snapshot
from .storage import ImageStorage, Storage

__all__ = ["GalleryIndex", "ImageStorage", "IndexMatches", "IndexStats", "Item", "Match", "Snapshot", "Storage"]
