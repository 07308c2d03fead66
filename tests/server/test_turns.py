"""Tasks that begin a few at a time."""

from __future__ import annotations

import asyncio

from dqe_engine.server.turns import Turns


def test_a_crowd_begins_a_few_in_each_turn_of_the_loop_in_order() -> None:
    begun: list[list[int]] = []

    async def main() -> Turns:
        turns = Turns(3)

        async def task(n: int) -> None:
            await turns()
            begun[-1].append(n)

        tasks = [asyncio.create_task(task(n)) for n in range(8)]
        while not all(one.done() for one in tasks):
            begun.append([])
            await asyncio.sleep(0)
        return turns

    turns = asyncio.run(main())
    assert [n for turn in begun for n in turn] == list(range(8))
    assert max(map(len, begun)) == 3
    assert len(turns) == 0


def test_those_that_wait_are_counted_and_one_that_is_cancelled_takes_no_place() -> None:
    async def main() -> None:
        turns = Turns(1)
        tasks = [asyncio.create_task(turns()) for _ in range(4)]
        await asyncio.sleep(0)
        assert len(turns) == 3
        tasks[1].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert tasks[2].done() or await asyncio.wait_for(tasks[2], 30) is None
        await asyncio.wait_for(tasks[3], 30)
        assert (len(turns), tasks[1].cancelled()) == (0, True)
        await asyncio.wait_for(turns(), 30)  # alone again: at once

    asyncio.run(main())


def test_one_whose_turn_has_come_is_counted_until_it_runs() -> None:
    async def main() -> list[int]:
        turns, begun, seen = Turns(2), [], []
        loop = asyncio.get_running_loop()

        async def task(n: int) -> None:
            await turns()
            begun.append(n)

        def look() -> None:  # wherever the loop may read requests
            seen.append(len(begun) + len(turns))
            if len(begun) < 9:
                loop.call_soon(look)

        tasks = [asyncio.create_task(task(n)) for n in range(9)]
        loop.call_soon(look)
        await asyncio.gather(*tasks)
        return seen

    assert set(asyncio.run(main())) == {9}
