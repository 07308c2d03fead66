"""How many random cases a test tries: few in every run, many in `make test-thorough`, which sets DQE_THOROUGH=1."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("DQE_THOROUGH") == "1"


def cases(usual: int, thorough: int) -> int:
    return thorough if THOROUGH else usual
