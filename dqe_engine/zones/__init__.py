"""Δ-score zone selection: top-k, zone counts and seeded mid-zone picks over a gallery, in one sweep."""

from .request import ZoneSelection
from .screen import Screen
from .select import select_zones

__all__ = ["Screen", "ZoneSelection", "select_zones"]
