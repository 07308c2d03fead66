"""How long work shows where it is, and ends between two batches when it is asked to."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def progress_bar(work: str) -> Iterator[Callable[[int, int], None]]:
    """A function that moves the bar on stderr to (images done, images in all); no bar where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(work), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(work, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def mining_bars() -> Iterator[tuple[Callable[[int, int], None], Callable[[int, int], None]]]:
    """Two functions that move bars on stderr, for bytes read and for queries mined; no bars where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            if not task.speed:
                return Text("")
            return Text(f"{task.speed / 2**20:,.0f} MiB/s" if task.fields["bytes"] else f"{task.speed:,.1f} queries/s")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), Rate())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bars:
        tasks: dict[str, Any] = {}

        def mover(name: str) -> Callable[[int, int], None]:
            def move(done: int, total: int) -> None:
                if name not in tasks:  # with what is done, which would else count as speed
                    tasks[name] = bars.add_task(name, total=total, completed=done, bytes=name == "reading inputs")
                bars.update(tasks[name], completed=done)

            return move

        yield mover("reading inputs"), mover("mining")


@contextmanager
def interrupts_between_batches() -> Iterator[Callable[[], None]]:
    """Hold back the first Ctrl-C until the yielded function is called, which then raises KeyboardInterrupt.

    A second Ctrl-C stops at once. Only the main thread receives signals; elsewhere nothing is held back, nor where SIGINT was
    ignored from the start, as in a shell's background job: a signal that the caller had us ignore stays ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield lambda: None
        return
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("the work stops after this batch; press Ctrl-C again to stop at once", file=sys.stderr)

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
