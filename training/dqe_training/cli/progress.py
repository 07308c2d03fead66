"""Progress on stderr with rich: bars for loading and encoding, and a training bar with throughput and loss parts."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_VALIDATION = {f"val/recall_at_{k}": f"R@{k}" for k in (1, 5, 10, 50)}


class TrainingProgress:
    """A trainer's listener: `with TrainingProgress() as listener: train_run(..., listener=listener)`."""

    def __init__(self, label: str = "training", *, unit: str = "triplets", console: Console | None = None, shown: bool = True) -> None:
        self.label, self.unit = label, unit
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"), console=self._console, disable=not shown,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def _task(self, name: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=1.0, note="")
        return self._tasks[name]

    def __call__(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "load" | "encode":
                name = "loading images" if event["event"] == "load" else "encoding images"
                self._progress.update(
                    self._task(name), completed=event["done"] / event["total"], note=f"{event['done']} of {event['total']}"
                )
            case "step":
                parts = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in event.items() if k.startswith("loss/"))
                note = f"epoch {event['epoch']} · {event['triplets_per_second']:.0f} {self.unit}/s · {parts}"
                self._progress.update(self._task(self.label), completed=event["fraction"], note=note)
            case "refresh":
                self._progress.console.print(f"negatives mined for epoch {event['epoch']} in {event['seconds']:.1f} s")
            case "validation":
                told = " ".join(f"{label} {event[name]:.3f}" for name, label in _VALIDATION.items() if name in event)
                if (headline := f"val/{event['headline']}") not in _VALIDATION:
                    told += f" {event['headline']} {event[headline]:.3f}"
                self._progress.console.print(f"step {event['step']}: {told}{', best so far' if event['best'] else ''}", highlight=False)
            case "features" | "start" | "notice":
                self._progress.console.print(event["text"], highlight=False, soft_wrap=True)
            case "resume":
                self._progress.console.print(f"resumed at step {event['step']}")


def simple_progress(console: Console | None = None) -> Progress:
    """A bar for work counted in items."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )  # fmt: skip
