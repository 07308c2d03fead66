"""Workers that fill a feature cache, are killed, and fill it two at a time (tests/training/test_features.py)."""

from __future__ import annotations

import os
from pathlib import Path

from support.dying import die_before_change
from support.fork_server import Tasks
from support.tiny_training import make_model

from dqe_training.features import cached_tokens, writing
from dqe_training.features.store import row_bytes

BATCH = 7
SHARD_ROWS = 14  # two batches


def small_shards() -> None:
    writing.ENCODE_BATCH = BATCH
    writing._SHARD_BYTES = SHARD_ROWS * row_bytes(make_model())


def image_names(images: str) -> list[str]:
    return sorted(path.name for path in Path(images).iterdir())


def fill(cache: str, images: str) -> None:
    small_shards()
    cached_tokens(Path(cache), make_model(), Path(images), image_names(images))


def fill_and_die(cache: str, images: str, die_before: int) -> None:
    """Die by SIGKILL just before the n-th change of what is on the disk."""
    die_before_change(die_before)
    fill(cache, images)


def fill_at_once(cache: str, images: str, writers: int) -> None:
    """Several processes fill one cache; fails when one of them does."""
    children = []
    for _ in range(writers):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                fill(cache, images)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    assert not any(statuses), statuses


TASKS: Tasks = {"fill": fill, "fill_and_die": fill_and_die, "fill_at_once": fill_at_once}
