"""Signals in tests, however these were started: a shell has background jobs ignore SIGINT, nohup SIGHUP, and children inherit that."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def interrupts_heard() -> Iterator[None]:
    """For the tests of a module that imports it: Python's own answer to SIGINT in this process, the system's in those it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def hangups_heard() -> Iterator[None]:
    """As above, for SIGHUP: the system's own answer."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
