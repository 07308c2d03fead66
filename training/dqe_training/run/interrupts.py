"""Ctrl-C and SIGTERM, held back until a training step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_signals(*, several: bool) -> Iterator[Callable[[], bool]]:
    """Hold both back while the block runs; the yielded function says whether one came. The handlers before are put back.

    `several`: this is one of several ranks. When these leave by KeyboardInterrupt, SIGTERM is ignored from then on: torchrun
    sends it to all others as soon as the first has left, and they would die of it instead of exiting with their own code.
    Signals are the main thread's; elsewhere nothing is held back. Nor is a signal that was ignored from the start, as SIGINT is
    in a shell's background job: it stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()

    previous = {number: signal.signal(number, ask) for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield asked.is_set
    except KeyboardInterrupt:
        if several:
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
