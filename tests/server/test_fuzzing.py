"""A few hundred mutated requests and images; `python -m support.server_fuzzing` sends ten thousand of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chaos import Server
from support.server_fuzzing import fuzz

from dqe_engine.bundle import Bundle
from dqe_engine.server.writes import make_index

pytestmark = pytest.mark.slow


def test_mutated_requests_and_images_are_no_bugs_of_ours(bundle_path: Path, tmp_path: Path) -> None:
    make_index(Bundle.load(bundle_path), tmp_path / "index")
    with Server(bundle_path, tmp_path, workers=1) as server:
        assert all(server.put(n).status_code == 201 for n in range(4))
        found = fuzz(server, 18, 150, 150)
        assert '"status":500' not in server.log()
    assert {200, 201, 400, 422} <= found.keys()
