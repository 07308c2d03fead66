"""Workers to kill. One process imports torch once and forks a worker per job, so that ten kills do not cost ten imports.

Protocol, over the pipes of that process: a JSON line `[task, arguments]` in; `started <pid>` and `ended <status>` out.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

Tasks = Mapping[str, Callable[..., None]]


def serve(tasks: Tasks) -> None:
    """Run jobs until the input ends. Called by the process that `ForkServer` starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background, and inherited
    for line in sys.stdin:
        name, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                tasks[name](**arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print("started", pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("ended", status, flush=True)


class ForkServer:
    """`with ForkServer(Path(module_file)) as server:` runs that file as the serving process."""

    def __init__(self, script: Path) -> None:
        tests = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> ForkServer:
        self._read("ready")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()

    def _read(self, word: str) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        if not line or line[0] != word:
            self._process.kill()
            raise AssertionError(f"the fork server said {line}: {self._process.communicate()[1][-3000:]}")
        return int(line[1]) if len(line) > 1 else 0

    def start(self, task: str, **arguments: object) -> int:
        """Start a worker; its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([task, arguments]) + "\n")
        self._process.stdin.flush()
        return self._read("started")

    def wait(self) -> int:
        """The exit status of the worker as `os.waitpid` gives it: a signal's number, or 256 times the exit code."""
        return self._read("ended")

    def run(self, task: str, **arguments: object) -> int:
        self.start(task, **arguments)
        return self.wait()

    def run_and_kill(self, task: str, after: float, **arguments: object) -> bool:
        """Start a worker and send SIGKILL `after` seconds later; whether that came before its end."""
        pid = self.start(task, **arguments)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):  # it ended before, and the server has waited for it
            os.kill(pid, signal.SIGKILL)
        return self.wait() == signal.SIGKILL
