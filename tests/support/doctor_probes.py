"""For the doctor's tests: probes that end badly, which run in its child processes, and a way to run its own without one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from dqe_engine.doctor.findings import Context, Finding, Steps, Trying, guarded

GOOD = Finding("good", "ok", "fine", facts={"answer": 42})


def findings(probe: Callable[[Context], Steps], **context: Any) -> dict[str, Finding]:
    """What a probe finds in this process, by name."""
    return {step.name: step for step in guarded(probe(Context(**context))) if isinstance(step, Finding)}


def noisy(context: Context) -> Steps:
    print("on stdout")
    os.write(1, b'{"finding": "not one"}\n')
    yield Trying("good", "nothing")
    yield GOOD
    yield Finding("context", "ok", f"{context.devices} {context.bundle} {context.providers}")


def raises(context: Context) -> Steps:
    yield GOOD
    yield Trying("risky", "mend it")
    raise RuntimeError("two\n  lines")


def crashes(context: Context) -> Steps:
    yield GOOD
    yield Trying("risky", "mend it")
    print("last words", file=sys.stderr, flush=True)
    os.abort()


def exits(context: Context) -> Steps:
    yield GOOD
    yield Trying("risky", "mend it")
    sys.exit(0)


def hangs(context: Context) -> Steps:
    yield Trying("risky", "mend it")
    time.sleep(600)


def driver_with_devices(context: Context) -> Steps:
    yield Finding("CUDA devices", "ok", "3 usable", facts={"devices": 3})
