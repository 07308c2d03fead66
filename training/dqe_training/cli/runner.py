"""What the commands that load PyTorch share."""

from __future__ import annotations

import os
from collections.abc import Callable

from dqe_engine.cli.main import run


def run_torch(handler: Callable[[], int]) -> int:
    """`dqe_engine.cli.main.run`, with idle OpenMP threads asleep: spinning ones made PyTorch 20 times slower on busy cores.

    The variable is read when torch loads, so it is set here, before the handler imports it; a value of the user's stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return run(handler)
