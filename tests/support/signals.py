"""Ctrl-C in tests, however the tests were started: shells have background jobs ignore SIGINT, and what is ignored is inherited."""

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
