"""SIGKILL at any moment of a training: a resume goes on, ends as if nothing had happened, and nothing corrupt ever loads."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from support.fork_server import ForkServer

from dqe_training.checkpointing.checkpoint import latest_checkpoint, load_checkpoint

KILLS = 10


@pytest.fixture
def server(torch_workers: ForkServer) -> ForkServer:
    return torch_workers


def assert_whole(run: Path, model: Path) -> None:
    """Whatever has a final name is complete and verified."""
    for checkpoint in (*run.glob("step-*"), run / "best", model):
        if checkpoint.exists():
            load_checkpoint(checkpoint)


def log(run: Path) -> list[tuple[int, float]]:
    return [
        (e["step"], e.get("loss/total", e.get("val/recall_at_10")))
        for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.mark.slow
def test_ten_kills_change_nothing(server: ForkServer, garments: Path, tmp_path: Path) -> None:
    started = time.perf_counter()
    assert server.run("train", data=str(garments), run=str(tmp_path / "straight"), model=str(tmp_path / "expected")) == 0
    duration = time.perf_counter() - started
    rng = random.Random(0)
    arguments = {"data": str(garments), "run": str(tmp_path / "run"), "model": str(tmp_path / "model")}
    steps, killed = [], 0
    for kill in range(KILLS):
        # The earlier kills come soon, so that something is left to kill; all are anywhere within steps, saves and renames.
        killed += server.run_and_kill("train", rng.uniform(0.04, 0.18) * duration, **arguments)
        assert_whole(tmp_path / "run", tmp_path / "model")
        newest = latest_checkpoint(tmp_path / "run")
        steps.append(0 if newest is None else load_checkpoint(newest).meta.progress.step)
        if kill == KILLS // 2:  # a second run from the start, so that kills at all stages are seen
            shutil.rmtree(tmp_path / "run")
            shutil.rmtree(tmp_path / "model", ignore_errors=True)
            steps.append(0)
    assert killed >= KILLS // 2, "the workers ended before they were killed"
    assert max(steps) > 5, "the workers were killed before they did anything"
    assert server.run("train", **arguments) == 0
    expected, found = (load_checkpoint(tmp_path / name) for name in ("expected", "model"))
    assert found.meta.progress.finished
    assert found.meta.progress.step == 60
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    assert found.meta.progress.best == expected.meta.progress.best is not None
    best = [load_checkpoint(tmp_path / run / "best") for run in ("straight", "run")]
    assert best[0].meta.progress.step == best[1].meta.progress.step == expected.meta.progress.best.step
    for name, value in best[0].model.state_dict().items():
        assert torch.equal(best[1].model.state_dict()[name], value), name
    assert log(tmp_path / "run") == log(tmp_path / "straight")
    leftovers = [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith((".tmp-step", ".tmp-best"))]
    assert leftovers == []


@pytest.mark.parametrize("die_before", [1, 2])
def test_a_kill_between_the_renames_of_a_replacement(server: ForkServer, garments: Path, tmp_path: Path, die_before: int) -> None:
    """Too short a moment to be hit by chance: the old one is moved aside, the new one not yet in place."""
    arguments = {"data": str(garments), "run": str(tmp_path / "run"), "model": str(tmp_path / "model")}
    pid = server.start("train", **arguments)
    while not list(tmp_path.glob("run/step-*")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    server.wait()
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    for other in tmp_path.glob("run/step-*"):
        if other != newest:
            shutil.rmtree(other)
    assert server.run("replace_and_die", checkpoint=str(newest), die_before=die_before) == signal.SIGKILL
    assert newest.exists() == (die_before == 1)
    before = {p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".tmp-step")}
    assert before
    steps = latest_steps_after_resume(server, arguments)
    assert steps[0] == int(newest.name.removeprefix("step-")) + 1, "the resume did not start from the checkpoint that was being replaced"


def latest_steps_after_resume(server: ForkServer, arguments: dict[str, str]) -> list[int]:
    """Steps that a resumed run logged, the first of them first."""
    path = Path(arguments["run"]) / "metrics.jsonl"
    path.write_text("")  # the log before is not of interest here
    assert server.run("train", **arguments) == 0
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]
