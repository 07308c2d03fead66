"""A process that adds items to an index by a `Writes` of its own, and says which were confirmed as they are."""

from __future__ import annotations

import sys
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from dqe_engine.engine import RetrievalEngine
from dqe_engine.server.operations import BusyError, Written
from dqe_engine.server.photos import Photos
from dqe_engine.server.writes import Writes

from .hostile_images import encoded
from .samples import noise_image

_AT_ONCE = 16


def main(bundle: str, index: str, name: str, count: str) -> None:
    """Prints `ready`, waits for a line, then prints the id of each item once it is confirmed."""
    engine = RetrievalEngine.load(Path(bundle), provider="cpu", threads=1)
    writes = Writes(Path(index), engine, Photos([], Path(f"{index}.uploads")), patience=30)
    images = [encoded(noise_image(seed), "PNG") for seed in range(20)]
    print("ready", flush=True)
    sys.stdin.readline()
    waiting: deque[tuple[int, Future[Written]]] = deque()
    for n in range(int(count)):
        waiting.append((n, add(writes, name, n, images)))
        if len(waiting) == _AT_ONCE:
            confirm(writes, name, images, *waiting.popleft())
    while waiting:
        confirm(writes, name, images, *waiting.popleft())
    writes.close()


def add(writes: Writes, name: str, n: int, images: list[bytes]) -> Future[Written]:
    return writes.add(f"{name}/{n}", images[n % len(images)], {"by": name, "n": n})


def confirm(writes: Writes, name: str, images: list[bytes], n: int, future: Future[Written]) -> None:
    while True:
        try:
            print(future.result().id, flush=True)
            return
        except BusyError:
            future = add(writes, name, n, images)


if __name__ == "__main__":
    main(*sys.argv[1:])
