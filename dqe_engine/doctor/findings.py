"""What a probe finds, and what it may know before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "not installed", "not available", "broken"]
"""`not installed`: a package or build that is optional; `not available`: the machine lacks what it needs, such as a GPU;
`broken`: it is there, and does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    status: Status
    found: str
    remedy: str | None = None
    """One line; None where nothing needs to be done."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same for machines: JSON types only."""


class Trying(NamedTuple):
    """What a probe says before it does something that may raise, hang or crash."""

    name: str
    remedy: str
    """What to do if it does."""


@dataclass(frozen=True, slots=True)
class Context:
    """What earlier probes found out, for later ones."""

    devices: int = 0
    """CUDA devices that a process can use."""
    bundle: str | None = None
    providers: tuple[str, ...] = ()
    """The engine's names of the providers that work, such as "cpu"."""


Steps = Iterator[Finding | Trying]
"""What a probe yields: a `Trying`, then the finding or findings it came to."""


NO_DEVICE = "nothing to do on a machine without an NVIDIA GPU"
"""The remedy for what needs a CUDA device where there is none."""


def one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:300]


def guarded(steps: Steps) -> Steps:
    """The same steps; an exception becomes a broken finding of what was being tried."""
    trying = Trying("probe", "report this as a bug of dqe-doctor")
    try:
        for step in steps:
            if isinstance(step, Trying):
                trying = step
            yield step
    except Exception as error:  # whatever a library raises is a finding
        yield Finding(trying.name, "broken", f"{type(error).__name__}: {one_line(error)}", trying.remedy)
