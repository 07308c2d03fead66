"""SIGKILL at any moment of an export: the bundle is absent or whole, and the next export works and cleans up."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.fork_server import ForkServer

from dqe_engine.bundle import Bundle
from dqe_engine.engine import RetrievalEngine

KILLS = 10


@pytest.fixture
def server(torch_workers: ForkServer) -> ForkServer:
    return torch_workers


def arguments(checkpoint: Path, out: Path, traced: Path) -> dict[str, str]:
    return {"checkpoint": str(checkpoint), "out": str(out), "traced": str(traced)}


@pytest.mark.slow
def test_ten_kills_leave_a_whole_bundle_or_none(server: ForkServer, checkpoint_path: Path, bundle_path: Path, tmp_path: Path) -> None:
    given = arguments(checkpoint_path, tmp_path / "out", bundle_path)
    rng = random.Random(0)
    whole, started = 0, 0
    begun = time.perf_counter()
    assert server.run("export_once", **given) == 0
    seconds = time.perf_counter() - begun  # kills come in the middle of exports and after them, however busy the machine is
    shutil.rmtree(tmp_path / "out")
    for kill in range(KILLS):
        assert server.run_and_kill("export_forever", rng.uniform(0.1, 2) * seconds, **given)
        started += any(p.name.startswith(".tmp-") for p in tmp_path.iterdir())
        if (tmp_path / "out").exists():
            RetrievalEngine.load(tmp_path / "out", provider="cpu", threads=1)
            whole += 1
        if kill % 3 == 2:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)  # so that some kills meet a first export
    assert started, "no kill came in the middle of an export"
    assert whole, "no export came to its end"
    assert server.run("export_once", **given) == 0
    assert Bundle.load(tmp_path / "out").model_hash == Bundle.load(bundle_path).model_hash
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("die_before", [1, 2])
def test_a_kill_at_a_rename(
    server: ForkServer, checkpoint_path: Path, bundle_path: Path, tmp_path: Path, existing: bool, die_before: int
) -> None:
    if existing:
        shutil.copytree(bundle_path, tmp_path / "out")
    given = arguments(checkpoint_path, tmp_path / "out", bundle_path)
    status = server.run("export_once", die_before=die_before, **given)
    assert status == (signal.SIGKILL if existing or die_before == 1 else 0)
    if (tmp_path / "out").exists():
        Bundle.load(tmp_path / "out")
    assert (tmp_path / "out").exists() == (existing == (die_before == 1))
    assert server.run("export_once", **given) == 0
    Bundle.load(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
