"""A `dqe-serve` of its own process, as a test starts and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx


class Server:
    """The process, its address, and what it says on stderr."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log, self.url = process, log, ""

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def workers(self) -> set[int]:
        """Process ids of the workers that serve."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {int(worker) for worker in re.findall(r'dqe_process_start_time_seconds\{worker="(\d+)"\}', text)}

    def end(self, sent: int = signal.SIGTERM) -> int:
        self.process.send_signal(sent)
        return self.process.wait(60)


@contextmanager
def serving(
    arguments: Sequence[str], folder: Path, *, environment: Mapping[str, str] | None = None, port: int = 0, wait: float = 120.0
) -> Iterator[Server]:
    """A server with these arguments, run in `folder`, that answers. Ended with the block, killed where it does not end."""
    command = [str(Path(sys.executable).with_name("dqe-serve")), *arguments, "--port", str(port)]
    log, out = folder / f"serve-{time.monotonic_ns()}.err", folder / f"serve-{time.monotonic_ns()}.out"
    with log.open("w") as errors, out.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **(environment or {})}, stdout=output, stderr=errors, text=True)
    server = Server(process, log)
    try:
        until = time.monotonic() + wait
        while True:
            assert process.poll() is None, f"it ended: {server.said}"
            assert time.monotonic() < until, f"it does not answer: {server.said}"
            if found := re.search(r"http://\S+:\d+", out.read_text()):
                server.url = found[0]
                try:
                    if httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
            time.sleep(0.05)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
