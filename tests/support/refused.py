"""What a refusal is: an error of ours, in one line that says what it must."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dqe_engine.errors import DQEError


def refused(call: Callable[[], object], *parts: str, kind: type[DQEError]) -> None:
    """`call` raises `kind`, with all `parts` in its message."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message, message
