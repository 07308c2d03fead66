"""What is asked of `Writes`, what it answers, and why it may refuse."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import DeadlineError, DQEError

Metadata: TypeAlias = Mapping[str, Any] | None


class BusyError(DQEError):
    """Another process writes to the index and does not let go of it. `retry_after`: seconds after which to ask again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ItemExistsError(DQEError):
    """An item with this id is in the index, and nobody said that it may be replaced."""


@dataclass(frozen=True)
class Written:
    """What was done, once it is on the disk. `content`: of the item, None for a removed one. `revision`: of the save."""

    id: str
    content: str | None
    revision: str


@dataclass(frozen=True)
class Removal:
    """What the next save takes from an id. `uploaded`: an upload that goes with it, so that what lies in a folder was no part of it.
    `replaced`: whether another image follows under the same id, else it is removed."""

    id: str
    uploaded: bool
    replaced: bool


@dataclass(eq=False)
class Operation:
    """What somebody waits for. `data`, `tokens`: of an "add"; the tokens are there once it was encoded."""

    kind: Literal["add", "update", "remove"]
    id: str
    deadline: float
    metadata: dict[str, Any] | None = None
    data: bytes = b""
    replace: bool = False
    content: str | None = None
    tokens: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    future: Future[Written] = field(default_factory=Future)

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self.deadline


def deadline_in(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def too_late() -> DeadlineError:
    return DeadlineError("the change was not written by its deadline, and will not be; send it again, or allow more time")
