"""What was asked of the code, beside what was measured: printed and never asserted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .report import table


@dataclass(frozen=True, slots=True)
class Target:
    """`asked` and `measured` in words; `met` is None where it was not measured."""

    section: str
    what: str
    asked: str
    measured: str
    met: bool | None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def targets_table(verdicts: Sequence[Target]) -> str:
    words = {True: "yes", False: "**no**", None: "–"}
    rows = [(target.what, target.asked, target.measured, words[target.met]) for target in verdicts]
    return table(("target", "asked", "measured [95 % interval]", "met"), rows)
