"""Callers that ask at the same time: each gets its own answer, and nothing that one does touches another's."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.answers import Answers, hold, until

from dqe_engine.batching import Batcher
from dqe_engine.errors import DeadlineError, InputError, OverloadError


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


def test_closing_does_not_wait_for_patience(answers: Answers) -> None:
    patient = Batcher(answers, patience=30)
    future = patient.submit(1)
    until(lambda: patient._leading is not None)
    patient.close()
    assert future.done()


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
