"""`Batcher`: callers that ask at the same time are answered together."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .errors import DeadlineError, InputError, NoAnswerError, OverloadError
from .forks import ProcessBound
from .processors import give_way

Q = TypeVar("Q")
R = TypeVar("R")


class _Signal:
    """An event for one thread that waits. `set` is a single step: in the middle of an Event's, Ctrl-C would leave it half set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        with suppress(RuntimeError):  # it was set before
            self._lock.release()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it was set; then it no longer is."""
        return self._lock.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))


@dataclass(eq=False)
class _Entry(Generic[Q, R]):
    """A question. `wake`: there is an answer, or its caller is to lead. `leads`: its caller has to hand over before it leaves.
    `settled`: somebody has taken it on to set the future."""

    question: Q | None  # None: still being made
    timeout: float | None
    wake: _Signal | None  # None: nobody waits in a thread of his own, so it cannot lead
    future: Future[R] = field(default_factory=Future)
    leads: bool = False
    settled: bool = False
    enqueued: float = field(default_factory=time.monotonic)
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = float("inf") if self.timeout is None else self.enqueued + self.timeout

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
    each question alone that is not late, so that one caller's mistake is nobody else's, but not after a NoAnswerError, which is
    everybody's; a caller who leaves by an exception of its own (Ctrl-C) leaves
    the others to the next leader, but for the few instructions in which Python takes its own locks: an exception there keeps them.
    `most`: questions in a batch. `patience`: seconds that a leader waits for others before it begins; 0 for not at all, since others
    queue up while a batch runs anyway. `room`: questions that may wait; one more is an OverloadError at once, which is kinder than a late
    answer. `niceness`: of the thread that leads where only tasks wait (see `give_way`).
    """

    def __init__(
        self, answer: Callable[[Sequence[Q]], Sequence[R]], *, most: int = 32, patience: float = 0.0, room: int = 256, niceness: int = 0
    ) -> None:
        """Raises InputError for bounds that are not positive (`patience`: negative)."""
        if most < 1 or room < 1 or not patience >= 0:
            raise InputError(f"expected most >= 1, room >= 1 and patience >= 0, got {most}, {room} and {patience}")
        self.most, self.patience, self.room = most, patience, room
        self._niceness = niceness
        self._answer = answer
        self._lock = threading.Lock()  # brief: guards what follows
        self._queue: deque[_Entry[Q, R]] = deque()
        self._unmade: dict[_Entry[Q, R], None] = {}  # not in the queue yet, as their questions are still being made
        self._taken: dict[_Entry[Q, R], None] = {}  # out of the queue by the leader, and not yet told their answers
        self._leader: _Entry[Q, R] | threading.Thread | None = None  # whose caller leads, or has been told to; or the worker
        self._leading: int | None = None  # the thread that does
        self._closed = False
        self._arrived = threading.Condition(self._lock)
        self._worker: threading.Thread | None = None  # leads where only tasks wait
        self._called = _Signal()  # the worker is to lead, or to end
        self.bind_to_process()

    @property
    def waiting(self) -> int:
        """Questions in the queue, or still being made for it, that somebody still asks."""
        with self._lock:
            return sum(not entry.future.cancelled() for entries in (self._queue, self._unmade) for entry in entries)

    def ask(self, question: Q, *, timeout: float | None = None) -> R:
        """The answer. Raises OverloadError where the queue is full, DeadlineError after `timeout` seconds, and what `answer` raised."""
        entry: _Entry[Q, R] = _Entry(question, timeout, _Signal())
        try:
            self._enqueue(entry)
            if self._leading == threading.get_ident():  # what a future calls when it is done asks again: nobody else would answer
                self._run_batches(entry)
            elif entry.leads or self._wait(entry):
                self._lead(entry)
            return entry.future.result()
        except BaseException:
            self._abandon(entry)
            raise
        finally:
            del entry.future  # an error has the frames that it came through, so until the garbage is collected it would keep itself

    def submit(self, question: Q, *, timeout: float | None = None) -> Future[R]:
        """A future of the answer, for callers that have no thread to spare; cancelling it takes the question out of the queue.

        Raises OverloadError at once where the queue is full. A worker thread of the batcher's own leads, if nobody else does. What is
        added to the future is called by whoever leads, so it should take no time; it may ask and submit. Whether `timeout` has passed is
        seen when the question's turn comes.
        """
        entry: _Entry[Q, R] = _Entry(question, timeout, None)
        try:
            self._enqueue(entry)
            if entry.leads:
                self._hand_over(entry)
        except BaseException:
            self._abandon(entry)
            raise
        return entry.future

    def submit_later(self, make: Callable[[], Q], executor: Executor, *, timeout: float | None = None) -> Future[R]:
        """`submit` of a question that takes work: `make` runs in a thread of `executor`, which nothing may cancel but the future.

        It has its room from now on, and is not made where by its turn it was cancelled or is late. What `make` raises is its caller's.
        """
        entry: _Entry[Q, R] = _Entry(None, timeout, None)
        try:
            self._enqueue(entry, made=False)
            executor.submit(self._make, entry, make)
        except BaseException:
            self._abandon(entry)
            raise
        return entry.future

    async def ask_async(self, question: Q, *, timeout: float | None = None) -> R:
        """`ask` for a task. A task that is cancelled leaves the queue."""
        return await self._answered(self.submit(question, timeout=timeout), timeout)

    async def ask_later_async(self, make: Callable[[], Q], executor: Executor, *, timeout: float | None = None) -> R:
        """`submit_later` for a task."""
        return await self._answered(self.submit_later(make, executor, timeout=timeout), timeout)

    @staticmethod
    async def _answered(future: Future[R], timeout: float | None) -> R:
        import asyncio  # which takes as long to load as half of this package

        begun = time.monotonic()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {time.monotonic() - begun:.3f} seconds; ask again, or allow more time") from error

    def close(self) -> None:
        """Refuse new questions from now on, answer those in the queue or on their way to it, and end the worker. May be called twice."""
        if not self.is_at_home:
            return  # nobody leads in a process that was forked
        with self._lock:
            self._closed = True
            self._arrived.notify_all()  # a leader that waits for others waits no longer
            worker, own = self._worker, threading.get_ident()
            is_leader = self._leading == own
        self._called.set()
        if worker is not None and worker.ident != own and not is_leader:  # else it would wait for itself
            worker.join()

    def __enter__(self) -> Batcher[Q, R]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _enqueue(self, entry: _Entry[Q, R], *, made: bool = True) -> None:
        self.check_process()
        with self._lock:
            if self._closed:
                raise OverloadError("this batcher is closed and takes no more questions; make a new one")
            if len(self._queue) + len(self._unmade) >= self.room:
                self._queue = deque(entry for entry in self._queue if not entry.future.cancelled())
                self._unmade = {entry: None for entry in self._unmade if not entry.future.cancelled()}
            if (waiting := len(self._queue) + len(self._unmade)) >= self.room:
                raise OverloadError(f"{waiting} questions are waiting, and no more may wait; ask again later")
            if entry.wake is None and self._worker is None:
                worker = threading.Thread(target=self._work, name="dqe-batcher", daemon=True)
                worker.start()  # which the system may refuse, so nothing has changed yet
                self._worker = worker
            if made:
                self._append(entry)
            else:
                self._unmade[entry] = None

    def _append(self, entry: _Entry[Q, R]) -> None:
        """With the lock held."""
        self._queue.append(entry)
        if self._leader is None:
            entry.leads, self._leader = True, entry
        self._arrived.notify()

    def _make(self, entry: _Entry[Q, R], make: Callable[[], Q]) -> None:
        failure: BaseException | None = None
        late = entry.deadline <= time.monotonic()
        wanted = not entry.settled and not entry.future.cancelled()
        if wanted and not late:
            try:
                entry.question = make()
            except BaseException as error:  # also what leaves threads: it is the caller's
                failure = error
        with self._lock:
            self._unmade.pop(entry, None)
            if made := wanted and not late and failure is None:
                self._append(entry)
            elif self._closed:
                self._called.set()  # the worker may have waited for this one alone
        if not made:
            if entry.future.set_running_or_notify_cancel():
                if late:
                    entry.expire()
                else:
                    entry.settle(error=failure)
        elif entry.leads:
            self._hand_over(entry)
        failure = None  # as in `ask`

    def _wait(self, entry: _Entry[Q, R]) -> bool:
        """Until there is an answer, or it is too late for one (False), or the entry's caller is to lead (True)."""
        assert entry.wake is not None
        left = None if entry.deadline == float("inf") else max(0.0, entry.deadline - time.monotonic())
        if not entry.wake.wait(left):
            with self._lock:
                if expired := not entry.leads and not entry.settled:
                    self._drop(entry)
            if expired:
                entry.expire()
        return entry.leads

    def _drop(self, entry: _Entry[Q, R]) -> None:
        """With the lock held: its caller has left. If its batch runs, the answer goes nowhere."""
        entry.settled = True
        self._taken.pop(entry, None)
        self._unmade.pop(entry, None)
        if entry in self._queue:
            self._queue.remove(entry)

    def _abandon(self, entry: _Entry[Q, R]) -> None:
        """After an exception in its caller's thread, wherever that was: answers of `answer`'s own change nothing here."""
        with self._lock:
            self._drop(entry)
        if entry.leads:
            self._hand_over(entry)

    def _lead(self, own: _Entry[Q, R] | None) -> None:
        """Run batches until `own` is answered (None: until the queue is empty), then hand over; after an exception, `_abandon` does."""
        self._leading = threading.get_ident()
        self._run_batches(own)
        self._hand_over(own)

    def _run_batches(self, own: _Entry[Q, R] | None) -> None:
        while (own is None or not own.settled) and (batch := self._next_batch()):
            self._run(batch)

    def _next_batch(self) -> list[_Entry[Q, R]]:
        """The next questions that somebody still wants answered in time."""
        batch: list[_Entry[Q, R]] = []
        late: list[_Entry[Q, R]] = []
        with self._lock:
            if self.patience:
                self._arrived.wait_for(lambda: len(self._queue) >= self.most or self._closed, self.patience)
            while self._queue and len(batch) < self.most:
                entry = self._queue[0]
                wanted = entry.future.running() or entry.future.set_running_or_notify_cancel()
                if wanted:
                    self._taken[entry] = None  # first: an exception finds it in one place or both, never in none
                self._queue.popleft()
                if wanted:
                    (late if entry.deadline <= time.monotonic() else batch).append(entry)
        for entry in late:
            self._settle(entry, late=True)
        return batch

    def _run(self, batch: list[_Entry[Q, R]]) -> None:
        failure: BaseException | None = None
        try:
            answers = list(self._answer([entry.question for entry in batch]))  # type: ignore[misc]  # made, as they were in the queue
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} questions")
        except BaseException as error:
            if not isinstance(error, Exception) and threading.current_thread() is not self._worker:
                raise  # Ctrl-C in the leader's thread, say: it is nobody else's
            failure = error
        if failure is None:
            for entry, answer in zip(batch, answers, strict=True):
                self._settle(entry, answer)
        elif len(batch) == 1 or isinstance(failure, NoAnswerError):
            for entry in batch:
                self._settle(entry, error=failure)
        else:
            while batch:
                entry = batch.pop(0)
                if entry.deadline <= time.monotonic():
                    self._settle(entry, late=True)
                else:
                    self._run([entry])
        failure = None  # as in `ask`
        batch.clear()

    def _settle(self, entry: _Entry[Q, R], answer: R | None = None, *, error: BaseException | None = None, late: bool = False) -> None:
        with self._lock:
            waited_for, entry.settled = not entry.settled, True
        if waited_for:
            if late:
                entry.expire()
            else:
                entry.settle(answer, error)
        with self._lock:
            self._taken.pop(entry, None)

    def _hand_over(self, own: _Entry[Q, R] | None) -> None:
        """To the first caller that waits with a thread of its own, to the worker where only tasks wait, or to nobody.

        An exception in the middle of it is mended by a second call: the heir is told once more.
        """
        with self._lock:
            if self._leader is (own or self._worker):
                self._put_back()
                self._leading = None
                heir = next((entry for entry in self._queue if entry.wake is not None), None)
                if heir is not None:
                    heir.leads = True
                self._leader = heir or (self._worker if self._queue else None)
            if isinstance(self._leader, _Entry):
                assert self._leader.wake is not None
                self._leader.wake.set()
            elif self._leader is not None or self._closed:
                self._called.set()
            if own is not None:
                own.leads = False

    def _put_back(self) -> None:
        """With the lock held: what a leader took and did not answer, because an exception came between, is next in the queue again."""
        for entry in reversed(self._taken):
            if entry in self._queue:
                continue
            if not entry.future.done():
                entry.settled = False
                self._queue.appendleft(entry)
            elif entry.wake is not None:
                entry.wake.set()
        self._taken.clear()

    def _work(self) -> None:
        give_way(self._niceness)
        while True:
            self._called.wait()
            with self._lock:
                leads = self._leader is self._worker
                if self._closed and self._leader is None and all(entry.future.cancelled() for entry in self._unmade):
                    return
            if leads:
                try:
                    self._lead(None)
                except BaseException:  # of what a future called when it was done: futures themselves take care of `Exception` alone
                    logging.getLogger(__name__).exception("what was added to a future raised")
                    self._hand_over(None)
