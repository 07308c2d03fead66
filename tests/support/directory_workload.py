"""A process that writes one directory again and again, recorded by `disk_calls.c`, and processes of it that die in between."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path

from dqe_engine.files import atomic_directory, recover_directory

MARKER = "about.json"


def contents(number: int) -> dict[str, str]:
    """What the directory holds the `number`-th time, by path within it."""
    return {MARKER: f"about {number}", "part/a.bin": f"{number}" * 3000, **{f"{number}.txt": "" for _ in range(number % 2)}}


def write(path: Path, number: int, *, replace: bool) -> None:
    with atomic_directory(path, replace=replace, marker=MARKER) as new:
        (new / "part").mkdir()
        for name, text in contents(number).items():
            (new / name).write_text(text)


def die_after_rename(count: int) -> None:
    rename = os.replace
    left = [count]

    def replace(*names: Path) -> None:
        rename(*names)
        left[0] -= 1
        if left[0] == 0:
            os._exit(0)

    os.replace = replace  # type: ignore[assignment]


def fail_to_replace(path: Path) -> None:
    """The old one is moved aside, the new one cannot be put there, and the old one is put back."""
    rename, calls = os.replace, []

    def replace(*names: Path) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk is away for a moment")
        rename(*names)

    os.replace = replace  # type: ignore[assignment]
    try:
        with contextlib.suppress(OSError):
            write(path, 0, replace=True)
    finally:
        os.replace = rename


def record(path: Path, times: int) -> None:
    """New at first, then replaced. Every second time a process dies before: after it has moved the old one aside, after it has put the
    new one there, or once the old one is about to be removed; and then, sometimes, someone reads before the next one writes."""
    calls = ctypes.CDLL(None)
    for number in range(1, times + 1):
        calls.disk_calls_mark(f"begin {number}".encode())
        if number % 2 == 0:
            if (child := os.fork()) == 0:
                die_after_rename(1 + number // 2 % 3)
                write(path, number, replace=True)
            os.waitpid(child, 0)
            if number % 12 in (4, 6):
                recover_directory(path)
        else:
            if number == 3:
                fail_to_replace(path)
            write(path, number, replace=number > 1)
            calls.disk_calls_mark(f"confirmed {number}".encode())


if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]))
