"""Runs the cells of a plan that are not finished, in one process or several; a killed run goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.files import directory_lock, try_directory_lock

from ..config import TrainConfig
from ..data.images import load_pixels
from ..encoding import Listener
from ..run.trainer import Trainer, finish_run
from ..run.workflow import train_run
from .audit import audit
from .plan import Cell, Plan
from .results import CellResult, finished, machine, read_cell, stored, write_cell
from .source_hash import source_hash
from .subjects import Subject

Results = dict[str, CellResult]
Watch = Callable[[str], AbstractContextManager[Listener]]
"""Opens a listener under a label."""


def run_plan(
    plan: Plan,
    subject: Subject,
    out: Path,
    *,
    features: Path,
    watch: Watch,
    after: Callable[[Results], None] = lambda results: None,
    keep_models: bool = False,
    wait: bool = True,
) -> Results:
    """Train and evaluate what `out` lacks; returns all results by key, and tells `after` of them at the start and after each cell.

    A frozen tower's image tokens come from the feature cache `features`, which the first cell fills; where the tower trains,
    cells share decoded pixels. A cell's run directory is `out/runs/<key>`, removed when the cell is finished; with
    `keep_models`, its model stays as `out/models/<key>`. Processes with one `out` share its cells: each takes the next that nobody has,
    and in the end waits for those that others have, unless `wait` is off. Ctrl-C writes a checkpoint and raises KeyboardInterrupt.
    Raises InputError and CheckpointError.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be the output folder ({error.strerror}); choose another one") from error
    pixels = _SharedPixels(subject)
    results = finished(out, plan.cells)
    after(results)
    for patient in (False, True) if wait else (False,):
        for number, cell in enumerate(plan.cells, start=1):
            if cell.key in results:
                continue
            with _claimed(out, cell, patient=patient) as ours:
                if ours and read_cell(out, cell) is None:  # another process may have finished it meanwhile
                    with watch(f"{number}/{len(plan.cells)} {cell.arm}, seed {cell.seed}") as listener:
                        _run_cell(cell, subject, out, features, pixels, listener, keep_models)
            results = finished(out, plan.cells)
            after(results)
    if len(results) == len(plan.cells):
        for used in ("runs", "claims"):
            shutil.rmtree(out / used, ignore_errors=True)
    return results


@contextmanager
def _claimed(out: Path, cell: Cell, *, patient: bool) -> Iterator[bool]:
    """Whether the cell is this process's while the block runs. `patient`: wait for one that has it; it is then this process's."""
    claim, held = out / "claims" / cell.key, ExitStack()
    while True:
        try:
            claim.mkdir(parents=True, exist_ok=True)
            got = held.enter_context(directory_lock(claim) if patient else try_directory_lock(claim))
            break
        except FileNotFoundError:  # removed in between, by the process that finished the last cell
            continue
    with held:
        yield patient or bool(got)


class _SharedPixels:
    """The decoded training images where a tower trains on them, loaded once per preprocessing."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._held: dict[PreprocessingSpec, NDArray[np.uint8]] = {}

    def __call__(self, config: TrainConfig) -> NDArray[np.uint8] | None:
        spec, source = config.model.preprocessing, self._subject.source
        if config.optim.vision_learning_rate == 0:
            return None
        if spec not in self._held:
            self._held = {spec: load_pixels(source.images, source.read(source.read_vocabulary()).images, spec)}
        return self._held[spec]


def _run_cell(
    cell: Cell, subject: Subject, out: Path, features: Path, pixels: _SharedPixels, listener: Listener, keep_models: bool
) -> None:
    run = out / "runs" / cell.key
    cache = features if cell.config.optim.vision_learning_rate == 0 else None
    trainer = train_run(cell.config, subject.source, run, listener=listener, features=cache, pixels=pixels(cell.config))
    scores = subject.evaluate(trainer, cache, listener) | audit(trainer, trainer.model.vocabulary)
    result = CellResult(
        key=cell.key, seed=cell.seed, config=cell.config, steps=trainer.progress.step,
        seconds=round(trainer.progress.seconds, 2), refreshes=_refreshes(trainer), machine=machine(), code=source_hash(),
        scores=stored(scores),
    )  # fmt: skip
    if keep_models:
        finish_run(run, out / "models" / cell.key, replace=True)
    write_cell(out, cell, result)
    shutil.rmtree(run, ignore_errors=True)


def _refreshes(trainer: Trainer) -> int:
    """How often negatives were mined: at the start of every epoch that was begun, after the warm-up, at the interval."""
    trns, progress = trainer.config.trns, trainer.progress
    begun = progress.epoch + (progress.step_in_epoch > 0)
    return len(range(trns.warmup_epochs, begun, trns.interval)) if trns.enabled else 0
