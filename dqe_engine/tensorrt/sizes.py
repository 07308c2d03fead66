"""The sizes of requests that engines are built for where nobody has named others."""

from __future__ import annotations

from ..contracts.engines import AxisRange, Profile

ANY_BATCH = AxisRange(min=1, opt=8, max=32)
"""Larger batches run in parts."""
SHORTEST_TEXT = 2  # tokens: the two that every text is put between
_TYPICAL_TEXT = 16  # tokens


def any_text(max_text_length: int) -> AxisRange:
    """Every text that a tokenizer which cuts at `max_text_length` gives."""
    return AxisRange(min=SHORTEST_TEXT, opt=min(_TYPICAL_TEXT, max_text_length), max=max_text_length)


def any_request(max_text_length: int) -> Profile:
    """One profile for all requests."""
    return Profile(batch=ANY_BATCH, text_length=any_text(max_text_length))
