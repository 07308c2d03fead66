"""What the commands that load PyTorch share."""

from __future__ import annotations

import os
from collections.abc import Callable

from dqe_engine.cli.main import run

_IDLE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""Idle OpenMP threads spin for some ten microseconds, then sleep. Sleeping at once, they wake up too late for small operations: a step of
the demo's model gained nothing from a second core. Spinning for longer, they take the time of others on busy cores."""


def run_torch(handler: Callable[[], int]) -> int:
    """`dqe_engine.cli.main.run`, with idle OpenMP threads that soon sleep.

    The variables are read when torch loads, so they are set here, before the handler imports it; values of the user's stay.
    """
    for name, value in _IDLE_THREADS.items():
        os.environ.setdefault(name, value)
    return run(handler)
