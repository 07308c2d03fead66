"""Δ-score zone selection: top-k, zone counts and seeded mid-zone picks over a gallery, in one sweep."""

from .request import ZoneSelection
from .select import select_zones

__all__ = ["ZoneSelection", "select_zones"]
