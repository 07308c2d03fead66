"""Clients that make load: wrk in a closed loop, and `paced`, which is built here, in either."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .server import Server

SOURCE = Path(__file__).with_name("paced.c")
HOW_TO_GET = "wrk is missing: apt-get install wrk (Debian, Ubuntu), brew install wrk, or https://github.com/wg/wrk"


class MissingToolError(Exception):
    """wrk, or a C compiler, is not installed."""


@dataclass(frozen=True)
class Load:
    """A server under load for `seconds`: what its client says, and how much of the processors both took.

    `told`: by wrk, {"requests", "p50_ms", "p99_ms", …}; by paced, {"statuses": {"200": {"count", "p50_ms", …}}, "unsent", …}.
    """

    seconds: float
    told: dict[str, Any]
    client_cores: float
    server_cores: float
    server_cpu_s: float
    load_average: float

    @property
    def rate(self) -> float:
        return float(self.told["requests"]) / self.seconds

    def record(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 2), **self.told, "client_cores": round(self.client_cores, 3),
            "server_cores": round(self.server_cores, 3), "server_cpu_s": round(self.server_cpu_s, 2), "load_average": self.load_average,
        }  # fmt: skip


def build(folder: Path) -> Path:
    """`paced`, compiled. Raises MissingToolError."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingToolError("a C compiler is missing: apt-get install gcc")
    program = folder / "paced"
    subprocess.run([compiler, "-O2", "-o", str(program), str(SOURCE)], check=True)
    return program


def wrk(server: Server, script: Path, *, connections: int, seconds: float) -> Load:
    """Each connection asks again as soon as it is answered. One thread, to leave the processors to the server. Raises MissingToolError."""
    program = shutil.which("wrk")
    if program is None:
        raise MissingToolError(HOW_TO_GET)
    command = [program, "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "30s", "--latency", "-s", str(script), server.url]
    output, load = _measured(server, command)
    found, errors = re.search(r"^JSON (.*)$", output, re.MULTILINE), re.search(r"^ERRORS (\d+)$", output, re.MULTILINE)
    if found is None or errors is None:
        raise RuntimeError(f"wrk said: {output[-500:]}")
    told = json.loads(found[1])
    load.told.update(told | {"other_than_2xx": int(errors[1])})
    return load


def paced(server: Server, program: Path, requests: Path, *, rate: float, connections: int, seconds: float) -> Load:
    """`rate` a second whatever becomes of them, or 0 for a closed loop."""
    command = [str(program), str(server.port), f"{rate:.3f}", f"{seconds:.1f}", str(connections), str(requests)]
    output, load = _measured(server, command)
    load.told.update(json.loads(output))
    return load


def _measured(server: Server, command: list[str]) -> tuple[str, Load]:
    before, begun, average = server.cpu_s(), time.perf_counter(), round(os.getloadavg()[0], 1)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, spent = time.perf_counter() - begun, server.cpu_s() - before
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}")
    return output, Load(seconds, {}, (used.ru_utime + used.ru_stime) / seconds, spent / seconds, spent, average)
