"""Δ-score zone selection: top-k, zone counts and seeded mid-zone picks over a gallery, in one sweep."""

from .mining import MinedNegatives, mine_negatives
from .pooled import resolve_pooled
from .request import ZoneSelection
from .screen import Screen
from .select import select_zones

__all__ = ["MinedNegatives", "Screen", "ZoneSelection", "mine_negatives", "resolve_pooled", "select_zones"]
