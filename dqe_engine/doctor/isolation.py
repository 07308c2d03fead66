"""A probe in a process of its own: a crash, a hang or noise of a native library is a finding, not the end of the doctor."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib import import_module

from .findings import Context, Finding, Trying, guarded, one_line

PROBE_SECONDS = 60.0
"""Far more than any probe needs: a first use of a GPU can take ten."""


def run_isolated(probe: str, context: Context, *, timeout: float = PROBE_SECONDS) -> list[Finding]:
    """What the probe ("package.module:function") finds, and one broken finding more if its process did not reach the end."""
    command = [sys.executable, "-P", "-c", f"from {__name__} import child; child()", probe, json.dumps(dataclasses.asdict(context))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # it must see what this process sees
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
        output, ended = done.stdout, _ending(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as late:
        output, ended = late.stdout or b"", f"no answer within {timeout:g} seconds"
    findings, trying, complete = _read(output)
    if not complete:
        findings.append(Finding(trying.name, "broken", ended, trying.remedy))
    return findings


def child() -> None:
    """Entry point of the child: one JSON line per step on the original stdout, whatever libraries print goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    probe, context = sys.argv[1], json.loads(sys.argv[2])
    module, _, function = probe.partition(":")
    steps = getattr(import_module(module), function)(Context(**context | {"providers": tuple(context["providers"])}))
    for step in guarded(steps):
        kind = "trying" if isinstance(step, Trying) else "finding"
        values = step._asdict() if isinstance(step, Trying) else dataclasses.asdict(step)
        print(json.dumps({kind: values}), file=lines, flush=True)
    print(json.dumps({"complete": True}), file=lines, flush=True)
    os._exit(0)  # what a library does in its destructors is not the probe's matter


def _read(output: bytes) -> tuple[list[Finding], Trying, bool]:
    """Findings, what was tried last, and whether the probe reached its end."""
    findings, trying = list[Finding](), Trying("probe", "report this as a bug of dqe-doctor")
    for line in output.splitlines():
        try:
            step = json.loads(line)
        except ValueError:  # cut off in the middle
            break
        if "complete" in step:
            return findings, trying, True
        if "trying" in step:
            trying = Trying(**step["trying"])
        else:
            findings.append(Finding(**step["finding"]))
    return findings, trying, False


def _ending(code: int, errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    said = f": {one_line(lines[-1])}" if lines else ""
    if code >= 0:
        return f"its process exited with code {code}{said}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its process crashed ({name}){said}"
