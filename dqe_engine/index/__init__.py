"""The gallery index: string ids, target tokens, cached image tokens and metadata; exact search; crash-safe on disk."""

from .gallery import GalleryIndex
from .searching import IndexMatches, Match
from .storage import ImageStorage, Storage

__all__ = ["GalleryIndex", "ImageStorage", "IndexMatches", "Match", "Storage"]
