"""Callers that ask at the same time: each gets its own answer, and nothing that one does touches another's."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from dqe_engine.batching import Batcher
from dqe_engine.errors import BackendError, DeadlineError, InputError, NoAnswerError, OverloadError


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


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def batcher(answers: Answers) -> Iterator[Batcher[int, int]]:
    with Batcher(answers, most=4, room=6) as made:
        yield made
        answers.gate.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as made:
        yield made


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


def test_a_caller_alone_is_answered_in_its_own_thread(batcher: Batcher[int, int], answers: Answers) -> None:
    assert [batcher.ask(n) for n in range(3)] == [0, 2, 4]
    assert answers.batches == [[0], [1], [2]]
    assert set(answers.threads) == {threading.get_ident()}


def test_what_queues_up_is_answered_together_and_in_order(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    leader, asked = hold(batcher, answers, pool), []
    for n in range(1, 7):
        asked.append(pool.submit(batcher.ask, n))
        until(lambda n=n: batcher.waiting == n)
    answers.gate.set()
    assert [leader.result(30), *(future.result(30) for future in asked)] == [2 * n for n in range(7)]
    assert answers.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert len(set(answers.threads)) == 3, "each leader answers its own batch and hands over"


def test_patience_fills_a_batch(answers: Answers, pool: ThreadPoolExecutor) -> None:
    patient = Batcher(answers, most=3, patience=30)
    assert [future.result(30) for future in [pool.submit(patient.ask, n) for n in (1, 2, 3)]] == [2, 4, 6]
    assert sorted(answers.batches[0]) == [1, 2, 3]


def test_one_mistake_is_nobody_elses(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    def refuse(questions: Sequence[int]) -> None:
        if 2 in questions:
            raise InputError("2 is not a question")

    answers.fails = refuse
    leader = hold(batcher, answers, pool)
    asked = [pool.submit(batcher.ask, n) for n in (1, 2, 3)]
    until(lambda: batcher.waiting == 3)
    answers.gate.set()
    assert [leader.result(30), asked[0].result(30), asked[2].result(30)] == [0, 2, 6]
    with pytest.raises(InputError, match="2 is not a question"):
        asked[1].result(30)


def test_where_nobody_answers_nobody_is_asked_alone(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    """A shard that hangs would be waited for once for each question."""

    def lose(questions: Sequence[int]) -> None:
        if questions[0]:
            raise NoAnswerError("shard 1 gave no answer")

    answers.fails = lose
    leader = hold(batcher, answers, pool)
    asked = [pool.submit(batcher.ask, 1), batcher.submit(2), pool.submit(batcher.ask, 3)]
    until(lambda: batcher.waiting == 3)
    answers.gate.set()
    assert leader.result(30) == 0
    for future in asked:
        with pytest.raises(NoAnswerError, match="shard 1 gave no answer"):
            future.result(30)
    assert [sorted(batch) for batch in answers.batches] == [[0], [1, 2, 3]]


def test_after_a_failed_batch_what_is_late_is_not_asked_alone(
    batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor
) -> None:
    def fail(questions: Sequence[int]) -> None:
        if len(questions) > 1:
            threading.Event().wait(0.6)  # until the second one's time is over
            raise InputError("not together")

    answers.fails = fail
    leader = hold(batcher, answers, pool)
    first, late = batcher.submit(1), batcher.submit(2, timeout=0.5)
    answers.gate.set()
    assert (leader.result(30), first.result(30)) == (0, 2)
    with pytest.raises(DeadlineError):
        late.result(30)
    assert [2] not in answers.batches


def test_a_wrong_number_of_answers_is_an_error(pool: ThreadPoolExecutor) -> None:
    with pytest.raises(RuntimeError, match="0 answers to 1 questions"):
        Batcher(lambda questions: []).ask(1)


def test_one_more_than_there_is_room_for_is_refused_at_once(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    leader = hold(batcher, answers, pool)
    waiting = [batcher.submit(n) for n in range(1, 7)]
    for ask in (batcher.ask, batcher.submit):
        with pytest.raises(OverloadError, match="6 questions are waiting"):
            ask(7)
    assert waiting[2].cancel()
    assert batcher.waiting == 5
    taken = batcher.submit(8)  # the room of the one that left
    answers.gate.set()
    assert leader.result(30) == 0
    assert [future.result(30) for future in (*waiting[:2], *waiting[3:], taken)] == [2, 4, 8, 10, 12, 16]
    assert not any(3 in batch for batch in answers.batches)


def test_a_deadline_takes_a_question_out_of_the_queue(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    leader = hold(batcher, answers, pool)
    with pytest.raises(DeadlineError, match=r"no answer within 0\.0"):
        batcher.ask(1, timeout=0.01)
    assert batcher.waiting == 0
    late, patient = batcher.submit(2, timeout=0.01), pool.submit(batcher.ask, 3, timeout=60)
    until(lambda: batcher.waiting == 2)
    threading.Event().wait(0.02)
    answers.gate.set()
    assert (leader.result(30), patient.result(30)) == (0, 6)
    with pytest.raises(DeadlineError):
        late.result(30)
    assert answers.batches == [[0], [3]]


def test_a_batch_that_runs_too_long_is_not_waited_for(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    answers.gate.clear()
    worker = batcher.submit(1, timeout=60)
    assert answers.began.wait(30)
    queued = pool.submit(batcher.ask, 2, timeout=60)
    until(lambda: batcher.waiting == 1)
    answers.began.clear()
    answers.gate.set()
    assert (worker.result(30), queued.result(30)) == (2, 4)
    answers.gate.clear()
    hold(batcher, answers, pool)
    asked = pool.submit(batcher.ask, 3, timeout=0.05)
    with pytest.raises(DeadlineError):
        asked.result(30)
    answers.gate.set()
    assert batcher.ask(4) == 8


def test_an_interrupt_is_its_own_threads(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    """Ctrl-C in a leader's thread ends its call; those it was answering are answered by the next."""

    def interrupt(questions: Sequence[int]) -> None:
        answers.fails = lambda questions: None
        raise KeyboardInterrupt

    first = hold(batcher, answers, pool)
    asked = [pool.submit(batcher.ask, n) for n in (1, 2, 3)]
    until(lambda: batcher.waiting == 3)
    answers.fails = lambda questions: setattr(answers, "fails", interrupt)
    answers.gate.set()
    assert first.result(30) == 0
    found = [(n, future.exception(30), None if future.exception() else future.result()) for n, future in enumerate(asked, start=1)]
    assert [type(error) for _, error, _ in found if error is not None] == [KeyboardInterrupt]
    assert all(answer == 2 * n for n, error, answer in found if error is None)
    assert batcher.ask(9) == 18


class Interrupt(BaseException):
    """What a signal raises in the main thread, as Ctrl-C does."""


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise Interrupt in here, this thread, unless it ends before."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_caller_that_is_interrupted_while_it_waits_leads_nobody(
    batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor
) -> None:
    leader = hold(batcher, answers, pool)
    with pytest.raises(Interrupt), interrupted_after(0.05):
        batcher.ask(1)
    assert batcher.waiting == 0
    behind = pool.submit(batcher.ask, 2)
    until(lambda: batcher.waiting == 1)
    answers.gate.set()
    assert [leader.result(30), behind.result(30), batcher.ask(3, timeout=30)] == [0, 4, 6]
    assert answers.batches == [[0], [2], [3]]


def test_a_timeout_beyond_what_a_lock_takes(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    leader = hold(batcher, answers, pool)
    patient = pool.submit(batcher.ask, 1, timeout=1e12)
    until(lambda: batcher.waiting == 1)
    answers.gate.set()
    assert (leader.result(30), patient.result(30), batcher.ask(2, timeout=30)) == (0, 2, 4)


@pytest.mark.parametrize("by_thread", [True, False])
def test_what_is_called_when_a_future_is_done_may_ask_and_close(
    batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor, *, by_thread: bool
) -> None:
    batcher.submit(9).result(30)  # the worker is there
    leader, found = hold(batcher, answers, pool), list[int]()
    future = batcher.submit(1)
    future.add_done_callback(lambda _: found.append(batcher.ask(2)))
    future.add_done_callback(lambda _: batcher.close())
    others = [pool.submit(batcher.ask, 3)] if by_thread else [batcher.submit(3)]
    until(lambda: batcher.waiting == 2)
    answers.gate.set()
    assert [one.result(30) for one in (leader, future, *others)] == [0, 2, 6]
    until(lambda: found == [4] and batcher._leader is None)
    assert answers.most_inside == 1


@pytest.mark.filterwarnings("error")
def test_the_worker_outlives_what_leaves_threads(batcher: Batcher[int, int], answers: Answers, caplog: pytest.LogCaptureFixture) -> None:
    """SystemExit of an answer is told to whoever asked; of what a future calls, it costs no other question."""

    def leave(questions: Sequence[int]) -> None:
        if 1 in questions:
            raise SystemExit

    def leaves(_: object) -> None:
        raise SystemExit

    answers.fails = leave
    with pytest.raises(SystemExit):
        batcher.submit(1).result(30)
    answers.gate.clear()
    futures = [batcher.submit(2), batcher.submit(3), batcher.submit(4)]
    futures[1].add_done_callback(leaves)
    answers.gate.set()
    assert [future.result(30) for future in futures] == [4, 6, 8]
    assert batcher.ask(5, timeout=30) == 10
    assert "what was added to a future raised" in caplog.text


def test_a_thread_that_the_system_refuses(batcher: Batcher[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("no more threads")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="no more threads"):
            batcher.submit(1)
    assert batcher.waiting == 0
    assert (batcher.ask(2, timeout=30), batcher.submit(3).result(30)) == (4, 6)


def test_closing_does_not_wait_for_patience(answers: Answers) -> None:
    patient = Batcher(answers, patience=30)
    future = patient.submit(1)
    until(lambda: patient._leading is not None)
    patient.close()
    assert future.done()


def test_a_process_that_is_forked_is_told(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    leader = hold(batcher, answers, pool)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(30)
            batcher.close()
            batcher.ask(1, timeout=1)
        except BackendError as error:
            code = 0 if "this Batcher was made before a fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    answers.gate.set()
    assert leader.result(30) == 0


def test_a_question_that_failed_is_not_kept(answers: Answers) -> None:
    class Question:
        pass

    def fail(questions: Sequence[Question]) -> list[int]:
        raise InputError("no")

    gc.collect()
    gc.disable()
    try:
        question, batcher = Question(), Batcher(fail)
        gone = weakref.ref(question)
        with suppress(InputError):
            batcher.ask(question)
        del question
        assert gone() is None
    finally:
        gc.enable()


def test_tasks(answers: Answers) -> None:
    async def ask_all(batcher: Batcher[int, int]) -> list[int]:
        return list(await asyncio.gather(*(batcher.ask_async(n, timeout=30) for n in range(100))))

    with Batcher(answers, most=8) as batcher:
        assert asyncio.run(ask_all(batcher)) == [2 * n for n in range(100)]
    assert answers.most_inside == 1
    assert max(map(len, answers.batches)) == 8
    assert threading.get_ident() not in answers.threads, "the event loop is not kept from its work"


def test_a_task_that_is_cancelled_or_late_leaves_the_queue(batcher: Batcher[int, int], answers: Answers, pool: ThreadPoolExecutor) -> None:
    async def leave() -> None:
        task = asyncio.create_task(batcher.ask_async(1))
        await asyncio.sleep(0.01)
        assert batcher.waiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert batcher.waiting == 0
        with pytest.raises(DeadlineError):
            await batcher.ask_async(2, timeout=0.01)
        assert batcher.waiting == 0

    leader = hold(batcher, answers, pool)
    asyncio.run(leave())
    answers.gate.set()
    assert leader.result(30) == 0
    assert answers.batches == [[0]]


def held(executor: ThreadPoolExecutor, gate: threading.Event) -> None:
    """The one thread of `executor` is busy until the gate opens."""
    began = threading.Event()
    executor.submit(lambda: (began.set(), gate.wait(30)))
    assert began.wait(30)


def test_a_question_that_is_made_later(batcher: Batcher[int, int], answers: Answers) -> None:
    def fail() -> int:
        raise InputError("not to be made")

    with ThreadPoolExecutor(1) as executor:
        futures = [batcher.submit_later(make, executor) for make in (lambda: 1, fail, lambda: 2)]
        assert (futures[0].result(30), futures[2].result(30)) == (2, 4)
        with pytest.raises(InputError, match="not to be made"):
            futures[1].result(30)
    assert batcher.waiting == 0
    assert batcher.ask(3) == 6


def test_what_is_still_to_be_made_has_its_room(batcher: Batcher[int, int]) -> None:
    gate, made = threading.Event(), list[int]()
    with ThreadPoolExecutor(1) as executor:
        held(executor, gate)
        futures = [batcher.submit_later(lambda n=n: made.append(n) or n, executor) for n in range(6)]
        assert batcher.waiting == 6
        for ask in (lambda: batcher.submit_later(lambda: 9, executor), lambda: batcher.ask(9)):
            with pytest.raises(OverloadError, match="6 questions are waiting"):
                ask()
        assert futures[2].cancel()
        assert batcher.waiting == 5
        late = batcher.submit_later(lambda: made.append(7) or 7, executor, timeout=0.001)
        threading.Event().wait(0.01)
        gate.set()
        assert [future.result(30) for future in futures if not future.cancelled()] == [0, 2, 6, 8, 10]
        with pytest.raises(DeadlineError):
            late.result(30)
    assert made == [0, 1, 3, 4, 5], "what was cancelled or is late is not made"


def test_closing_waits_for_what_is_made(answers: Answers, pool: ThreadPoolExecutor) -> None:
    batcher, gate = Batcher(answers), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        held(executor, gate)
        futures = [batcher.submit_later(lambda n=n: n, executor) for n in (1, 2, 3)]
        closing = pool.submit(batcher.close)
        until(lambda: batcher._closed)
        assert futures[2].cancel()
        gate.set()
        assert [future.result(30) for future in futures[:2]] == [2, 4]
        closing.result(30)


def test_an_executor_that_refuses(batcher: Batcher[int, int]) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        batcher.submit_later(lambda: 1, executor)
    assert batcher.waiting == 0


def test_closing_answers_what_waits_and_takes_no_more(answers: Answers, pool: ThreadPoolExecutor) -> None:
    batcher = Batcher(answers, most=2)
    leader = hold(batcher, answers, pool)
    waiting = [batcher.submit(n) for n in (1, 2, 3)]
    closing = pool.submit(batcher.close)
    until(lambda: batcher._closed)
    with pytest.raises(OverloadError, match="closed"):
        batcher.ask(4)
    answers.gate.set()
    assert [leader.result(30), *(future.result(30) for future in waiting)] == [0, 2, 4, 6]
    closing.result(30)
    batcher.close()
    Batcher(answers).close()


@pytest.mark.parametrize("bounds", [{"most": 0}, {"room": 0}, {"patience": -1}, {"patience": float("nan")}])
def test_bounds(bounds: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected most >= 1"):
        Batcher(lambda questions: questions, **bounds)


def test_everything_at_once(answers: Answers) -> None:
    """Threads and tasks, deadlines, cancellations and mistakes, for as long as it takes to ask some thousand questions."""
    refused, rng = {n for n in range(4000) if n % 37 == 5}, random.Random(0)

    def refuse(questions: Sequence[int]) -> None:
        if refused & set(questions):
            raise InputError("refused")

    answers.fails = refuse
    with Batcher(answers, most=8, room=64) as batcher, ThreadPoolExecutor(24) as pool, ThreadPoolExecutor(2) as makers:
        choices = [(n, rng.random(), rng.choice([None, 30.0, 0.0005])) for n in range(4000)]

        def one(choice: tuple[int, float, float | None]) -> str:
            n, way, timeout = choice
            try:
                if way < 0.6:
                    found = batcher.ask(n, timeout=timeout)
                else:
                    later = way > 0.8
                    future = batcher.submit_later(lambda: n, makers, timeout=timeout) if later else batcher.submit(n, timeout=timeout)
                    if way > 0.9 and future.cancel():
                        return "cancelled"
                    found = future.result(30)
            except (DeadlineError, OverloadError) as error:
                return type(error).__name__
            except InputError:
                assert n in refused
                return "refused"
            assert found == 2 * n
            assert n not in refused
            return "answered"

        outcomes = list(pool.map(one, choices))
        until(lambda: batcher.waiting == 0 and batcher._leader is None)
    assert answers.most_inside == 1
    assert {"answered", "refused"} <= set(outcomes)
    assert outcomes.count("answered") > 1500


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")
def test_what_answers_tasks_gives_way_and_who_asks_for_itself_does_not() -> None:
    def niceness(questions: Sequence[int]) -> list[int]:
        return [os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) for _ in questions]

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with Batcher(niceness, niceness=3) as batcher:
        assert batcher.submit(0).result(30) == min(19, own + 3)
        until(lambda: batcher._leader is None)
        assert batcher.ask(0) == own
    with Batcher(niceness) as batcher:
        assert batcher.submit(0).result(30) == own
