"""A `dqe-serve` in a process of its own, whose processor time and memory are read while it works."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_START_S = 120.0


@dataclass(frozen=True)
class Server:
    """`process`: of the command; with workers, their parent."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pids(self) -> list[int]:
        return _tree(self.process.pid)

    def cpu_s(self) -> float:
        """Seconds of processor time that its processes have taken."""
        return sum(_cpu_s(pid) for pid in self.pids())

    def resident_bytes(self) -> int:
        """Of all its processes, without what they share in files: the index is mapped by each."""
        return sum(_private_bytes(pid) for pid in self.pids())


@contextlib.contextmanager
def serving(bundle: Path, index: Path, *options: str, log: Path) -> Iterator[Server]:
    """Started on a free port, and ready. `log`: where its stderr goes."""
    program = Path(sys.executable).with_name("dqe-serve")
    command = [str(program), str(bundle), str(index), "--port", "0", "--log", "warning", *options]
    with log.open("ab") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://[^/]*:(\d+)/", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"dqe-serve said no address; see {log}")
        server = Server(process, int(found[1]))
        _wait_until_ready(server, _workers(options))
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(server: Server, workers: int) -> None:
    """Until as many workers are as were asked for."""
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            text = urllib.request.urlopen(f"{server.url}/metrics", timeout=5).read().decode()
            ready = re.search(r"^dqe_workers_ready ([\d.]+)", text, re.MULTILINE)
            if ready is not None and float(ready[1]) >= workers:
                return
        time.sleep(0.2)
    raise RuntimeError(f"dqe-serve was not ready within {_START_S:.0f} seconds")


def _workers(options: Sequence[str]) -> int:
    return int(options[options.index("--workers") + 1]) if "--workers" in options else 1


def _tree(pid: int) -> list[int]:
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += _tree(int(child))
    return found


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    return 0.0


def _private_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0
