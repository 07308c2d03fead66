"""Several ranks of a training on this machine: forked from one process that imported torch once, each with torchrun's variables.

`Ranks` is the test's side, `launcher` that of the process that forks (torch_workers.py). A rank's standard error goes to
`rank-<r>.err` in the folder of the job, its process id to `rank-<r>.pid`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.fork_server import ForkServer

RankTask = Callable[..., int | None]


def launcher(tasks: Mapping[str, RankTask]) -> Callable[..., None]:
    """A task of a fork server that runs one of `tasks` in each of some ranks, where it returns the rank's exit code (None: 0)."""

    def launch(job: str, size: int, port: int, folder: str, arguments: dict[str, Any]) -> None:
        children = [_fork(tasks[job], rank, size, port, Path(folder), arguments) for rank in range(size)]
        statuses = {child: os.waitpid(child, 0)[1] for child in children}
        codes = [os.waitstatus_to_exitcode(statuses[child]) for child in children]
        (Path(folder) / "codes.json").write_text(json.dumps(codes))

    return launch


def _fork(task: RankTask, rank: int, size: int, port: int, folder: Path, arguments: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stream = os.open(folder / f"rank-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 2)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
        code = task(**arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Ranks:
    """Jobs of several ranks, which `server` forks."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server

    def start(self, folder: Path, task: str, *, size: int = 2, **arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("codes.json", *(f"rank-{rank}.pid" for rank in range(size))):
            (folder / name).unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._server.start("launch", job=task, size=size, port=port, folder=str(folder), arguments=arguments)

    def wait(self, folder: Path) -> list[int]:
        """Exit codes of the ranks, minus the signal where one killed it."""
        assert self._server.wait() == 0
        return json.loads((folder / "codes.json").read_text())

    def run(self, folder: Path, task: str, *, size: int = 2, **arguments: Any) -> list[int]:
        self.start(folder, task, size=size, **arguments)
        return self.wait(folder)

    def signal(self, folder: Path, rank: int, number: signal.Signals) -> None:
        os.kill(int((folder / f"rank-{rank}.pid").read_text()), number)


def errors_of(folder: Path, size: int = 2) -> list[str]:
    """What each rank wrote to standard error."""
    paths = [folder / f"rank-{rank}.err" for rank in range(size)]
    return [path.read_text() if path.is_file() else "" for path in paths]


def wait_until(condition: Callable[[], Any]) -> None:
    """Give up after two minutes, which nothing here takes."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 120
        time.sleep(0.01)


def error_lines(text: str) -> Sequence[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]
