"""Target tokens of every image and composed queries of every pair, on the disk block by block: a kill loses one block, a rerun goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dqe_engine.contracts.parsing import Contract, parse_json, to_json
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_write, describe_write_error, directory_lock, make_directories
from dqe_engine.zones.arrays import F32
from dqe_training.encoding import ENCODE_BATCH
from dqe_training.evaluation.benchmarks import Ranker

from .work import Work

STATE, TARGETS, QUERIES = "encoded.json", "targets.f32", "queries.f32"
Opened = tuple[Ranker, str]
"""A ranker, and what it runs on."""


class State(Contract, frozen=True):
    """`encoded.json`: how much of both files is whole. `shape`: (M, D) of an image's target tokens. `seconds`: of encoding so far.
    `device`: what it ran on."""

    images: int = 0
    queries: int = 0
    shape: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    device: str = ""

    @property
    def per_image(self) -> float:
        """Seconds an image, with its queries; NaN before the first."""
        return self.seconds / self.images if self.images else float("nan")


@dataclass(frozen=True)
class Encoded:
    """targets: (G, M, D), queries: (Q, D), both float32, mapped from the disk, by the work's ids and pairs."""

    targets: F32
    queries: F32


def read_state(directory: Path) -> State:
    """The state of a folder, that of an empty one where there is none. Raises InputError for a damaged one."""
    path = directory / STATE
    if not path.is_file():
        return State()
    state = parse_json(State, path.read_bytes(), where=str(path))
    for name, rows, width in _files(state):
        size = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if size < rows * width:
            raise InputError(f"{directory / name}: {size} bytes, expected at least {rows * width}; remove {directory}, it is made again")
    return state


def encode(
    directory: Path,
    work: Work,
    open_ranker: Callable[[], Opened],
    *,
    blocks: int | None = None,
    progress: Callable[[State], None] = lambda state: None,
    between: Callable[[], None] = lambda: None,
) -> State:
    """Go on with what `directory` lacks, `blocks` of it at most. `progress` hears the state before the first and after each block,
    `between` may stop the work after one by raising. Raises InputError.

    A block is `ENCODE_BATCH` images and the pairs that have one of them as reference, so that an image goes through the tower once.
    """
    make_directories(directory)
    with directory_lock(directory):
        state = read_state(directory)
        progress(state)
        opened: Opened | None = None
        while state.images < len(work.ids) and blocks != 0:
            opened = opened or open_ranker()
            state = _next_block(directory, work, opened, state)
            progress(state)
            between()
            blocks = None if blocks is None else blocks - 1
        return state


def open_encoded(directory: Path, work: Work) -> Encoded:
    """What a finished folder holds."""
    state = read_state(directory)
    assert (state.images, state.queries) == (len(work.ids), len(work.pairs))
    targets = np.memmap(directory / TARGETS, "<f4", mode="r", shape=(state.images, *state.shape))
    return Encoded(targets, np.fromfile(directory / QUERIES, "<f4").reshape(state.queries, state.shape[1]))


def _next_block(directory: Path, work: Work, opened: Opened, state: State) -> State:
    started, (rank, device) = time.monotonic(), opened
    stop = min(state.images + ENCODE_BATCH, len(work.ids))
    asked = work.block(state.images, stop, state.queries)
    found = rank(asked, work.folder.root, [work.folder.names[id] for id in asked.gallery])
    tokens, width = found.target_tokens.shape[1:]
    after = State(
        images=stop, queries=state.queries + len(asked), shape=(tokens, width), seconds=state.seconds + time.monotonic() - started,
        device=device if device in state.device else " and ".join(filter(None, (state.device, device))),
    )  # fmt: skip
    try:
        for (name, rows, size), values in zip(
            _files(State(images=state.images, queries=state.queries, shape=after.shape)), (found.target_tokens, found.queries), strict=True
        ):
            _append(directory / name, rows * size, values)
        with atomic_write(directory / STATE) as stream:  # once the values are on the disk
            stream.write(to_json(after))
    except OSError as error:
        raise InputError(f"{describe_write_error(error, directory)}; what is encoded stays") from error
    return after


def _files(state: State) -> Sequence[tuple[str, int, int]]:
    """Name, rows, and bytes of a row."""
    tokens, width = state.shape
    return (TARGETS, state.images, 4 * tokens * width), (QUERIES, state.queries, 4 * width)


def _append(path: Path, size: int, values: F32) -> None:
    """After the first `size` bytes; what a killed run wrote behind them goes."""
    with open(path, "r+b" if path.exists() else "w+b") as stream:
        stream.truncate(size)
        stream.seek(size)
        stream.write(np.ascontiguousarray(values, "<f4").data)
        stream.flush()
        os.fsync(stream.fileno())
