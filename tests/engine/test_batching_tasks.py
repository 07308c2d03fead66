"""Tasks of an event loop that ask a `Batcher`, and questions that are still to be made in another thread."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.answers import Answers, hold, until

from dqe_engine.batching import Batcher
from dqe_engine.errors import DeadlineError, InputError, OverloadError


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
