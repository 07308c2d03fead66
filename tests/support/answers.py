"""What tests of `Batcher` ask: answers that can be held, and waiting until something is so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from dqe_engine.batching import Batcher


class Answers:
    """Doubles numbers. Holds the batches, stops at `gate`, and knows whether two ever ran at once."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: list[int] = []
        self.gate, self.began = threading.Event(), threading.Event()
        self.gate.set()
        self.inside = self.most_inside = 0
        self.fails: Callable[[Sequence[int]], None] = lambda questions: None

    def __call__(self, questions: Sequence[int]) -> list[int]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.batches.append(list(questions))
        self.threads.append(threading.get_ident())
        self.began.set()
        try:
            assert self.gate.wait(30)
            self.fails(questions)
            return [2 * question for question in questions]
        finally:
            self.inside -= 1


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to that")


def hold(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> Future[int]:
    """A leader whose batch, [0], runs until the gate opens."""
    answers.gate.clear()
    answers.began.clear()
    leader = pool.submit(batcher.ask, 0)
    assert answers.began.wait(30)
    return leader
