"""Batches that fail, callers that are interrupted, threads and forks that the system refuses: nobody else's answer is touched."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from support.answers import Answers, hold, until

from dqe_engine.batching import Batcher
from dqe_engine.errors import BackendError, DeadlineError, InputError, NoAnswerError


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
