"""What is traced is traced once, as in the export tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _traced_once(graphs_traced_once: None) -> None:
    pass
