"""Death by SIGKILL at a chosen change of what is on the disk."""

from __future__ import annotations

import os
import signal
from typing import Any

CHANGES = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")


def die_before_change(number: int, names: tuple[str, ...] = CHANGES) -> None:
    """From now on this process dies just before the `number`-th call of the functions `names` of `os`."""
    count = 0

    def mortal(change: Any) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **options)

        return counting

    for name in names:
        setattr(os, name, mortal(getattr(os, name)))
