"""`Batcher`: callers that ask at the same time are answered together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .errors import DeadlineError, InputError, OverloadError
from .forks import ProcessBound

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(eq=False)
class _Entry(Generic[Q, R]):
    """A question in the queue. `wake`: there is an answer, or its caller is to lead (`leads`)."""

    question: Q
    deadline: float
    future: Future[R]
    wake: threading.Event | None  # None: nobody waits in a thread of his own, so it cannot lead
    leads: bool = False
    settled: bool = False
    enqueued: float = field(default_factory=time.monotonic)

    def settle(self, answer: R | None = None, error: BaseException | None = None) -> None:
        """After `settled` was set, without the batcher's lock: a future calls what was added to it."""
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(answer)  # type: ignore[arg-type]
        if self.wake is not None:
            self.wake.set()

    def expire(self) -> None:
        """The same, too late."""
        self.settle(error=DeadlineError(f"no answer within {time.monotonic() - self.enqueued:.3f} seconds; ask again, or allow more time"))


class Batcher(ProcessBound, Generic[Q, R]):
    """Answers questions of many threads and tasks in batches, one batch at a time, in the order in which they came.

    Whoever asks while nothing runs becomes the leader: it answers its own question, and whatever has queued up, in its own thread, and
    then hands over to the next that waits. So a caller alone has no thread to wait for, and many share what a batch costs.

    `answer`: all answers to some questions, in their order; called by one thread at a time. Where it fails for a batch, it is called for
    each question alone, so that one caller's mistake is nobody else's. `most`: questions in a batch. `patience`: seconds that a leader
    waits for others before it begins; 0 for not at all, since others queue up while a batch runs anyway. `room`: questions that may
    wait; one more is an OverloadError at once, which is kinder than a late answer.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[R]], *, most: int = 32, patience: float = 0.0, room: int = 256) -> None:
        """Raises InputError for bounds that are not positive (`patience`: negative)."""
        if most < 1 or room < 1 or not patience >= 0:
            raise InputError(f"expected most >= 1, room >= 1 and patience >= 0, got {most}, {room} and {patience}")
        self.most, self.patience, self.room = most, patience, room
        self._answer = answer
        self._lock = threading.Lock()  # brief: guards what follows
        self._queue: deque[_Entry[Q, R]] = deque()
        self._busy = False  # somebody leads, or has been told to
        self._closed = False
        self._arrived = threading.Condition(self._lock)
        self._worker: threading.Thread | None = None  # leads where only tasks wait
        self._called = threading.Event()
        self._worker_leads = False
        self.bind_to_process()

    @property
    def waiting(self) -> int:
        """Questions in the queue that somebody still asks."""
        with self._lock:
            return sum(not entry.future.cancelled() for entry in self._queue)

    def ask(self, question: Q, *, timeout: float | None = None) -> R:
        """The answer. Raises OverloadError where the queue is full, DeadlineError after `timeout` seconds, and what `answer` raised."""
        entry, leads = self._enqueue(question, timeout, threading.Event())
        if leads:
            self._lead(entry)
        else:
            self._wait(entry)
        return entry.future.result()

    def submit(self, question: Q, *, timeout: float | None = None) -> Future[R]:
        """A future of the answer, for callers that have no thread to spare; cancelling it takes the question out of the queue.

        Raises OverloadError at once where the queue is full. A worker thread of the batcher's own leads, if nobody else does.
        """
        entry, leads = self._enqueue(question, timeout, None)
        if leads:
            with self._lock:
                self._call_worker()
        return entry.future

    async def ask_async(self, question: Q, *, timeout: float | None = None) -> R:
        """`ask` for a task. A task that is cancelled leaves the queue."""
        import asyncio  # which takes as long to load as half of this package

        begun = time.monotonic()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.submit(question, timeout=timeout)), timeout)
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {time.monotonic() - begun:.3f} seconds; ask again, or allow more time") from error

    def close(self) -> None:
        """Refuse new questions from now on, answer those in the queue, and end the worker. May be called twice."""
        with self._lock:
            self._closed = True
            worker = self._worker
        self._called.set()
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    def __enter__(self) -> Batcher[Q, R]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _enqueue(self, question: Q, timeout: float | None, wake: threading.Event | None) -> tuple[_Entry[Q, R], bool]:
        self.check_process()
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        entry: _Entry[Q, R] = _Entry(question, deadline, Future(), wake)
        with self._lock:
            if self._closed:
                raise OverloadError("this batcher is closed and takes no more questions")
            if len(self._queue) >= self.room:
                self._queue = deque(entry for entry in self._queue if not entry.future.cancelled())
            if len(self._queue) >= self.room:
                raise OverloadError(f"{len(self._queue)} questions wait already, and there is room for no more; ask again later")
            self._queue.append(entry)
            leads, self._busy = not self._busy, True
            self._arrived.notify()
        return entry, leads

    def _wait(self, entry: _Entry[Q, R]) -> None:
        assert entry.wake is not None
        left = None if entry.deadline == float("inf") else max(0.0, entry.deadline - time.monotonic())
        if not entry.wake.wait(left):
            with self._lock:
                if expired := not entry.leads and not entry.settled:
                    entry.settled = True
                    if entry in self._queue:  # else its batch runs, and its answer will be dropped
                        self._queue.remove(entry)
            if expired:
                entry.expire()
        if entry.leads:
            self._lead(entry)

    def _lead(self, own: _Entry[Q, R] | None) -> None:
        """Run batches until `own` is answered (None: until the queue is empty), then hand over."""
        try:
            while (own is None or not own.settled) and (batch := self._next_batch()):
                self._run(batch)
        except BaseException:
            with self._lock:
                if own is not None and own in self._queue:  # its caller leaves by this exception
                    self._queue.remove(own)
            raise
        finally:
            self._hand_over()

    def _next_batch(self) -> list[_Entry[Q, R]]:
        """The next questions that somebody still wants answered in time."""
        batch: list[_Entry[Q, R]] = []
        late: list[_Entry[Q, R]] = []
        with self._lock:
            if self.patience:
                self._arrived.wait_for(lambda: len(self._queue) >= self.most or self._closed, self.patience)
            while self._queue and len(batch) < self.most:
                entry = self._queue.popleft()
                if not entry.future.running() and not entry.future.set_running_or_notify_cancel():
                    continue
                if entry.deadline <= time.monotonic():
                    entry.settled = True
                    late.append(entry)
                else:
                    batch.append(entry)
        for entry in late:
            entry.expire()
        return batch

    def _run(self, batch: list[_Entry[Q, R]]) -> None:
        try:
            answers = list(self._answer([entry.question for entry in batch]))
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} questions")
        except Exception as error:
            if len(batch) == 1:
                self._settle(batch[0], error=error)
                return
            for entry in batch:
                self._run([entry])
        except BaseException:  # Ctrl-C in the leader's thread, say: it is nobody else's, so the others are answered by the next leader
            with self._lock:
                self._queue.extendleft(reversed([entry for entry in batch if not entry.settled]))
            raise
        else:
            for entry, answer in zip(batch, answers, strict=True):
                self._settle(entry, answer)

    def _settle(self, entry: _Entry[Q, R], answer: R | None = None, *, error: BaseException | None = None) -> None:
        with self._lock:
            waited_for, entry.settled = not entry.settled, True
        if waited_for:
            entry.settle(answer, error)

    def _hand_over(self) -> None:
        """To the first caller that waits with a thread of its own, to the worker where only tasks wait, or to nobody."""
        with self._lock:
            heir = next((entry for entry in self._queue if entry.wake is not None), None)
            if heir is not None and heir.wake is not None:
                heir.leads = True
                heir.wake.set()
            elif self._queue:
                self._call_worker()
            else:
                self._busy = False
                if self._closed:
                    self._called.set()

    def _call_worker(self) -> None:
        """With the lock held."""
        self._worker_leads = True
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="dqe-batcher", daemon=True)
            self._worker.start()
        self._called.set()

    def _work(self) -> None:
        while True:
            self._called.wait()
            with self._lock:
                self._called.clear()
                leads, self._worker_leads = self._worker_leads, False
                if not leads and self._closed and not self._busy:
                    return
            if leads:
                self._lead(None)
