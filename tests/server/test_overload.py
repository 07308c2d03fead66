"""Searches that are one too many."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from dqe_engine.server.metrics import Metrics
from dqe_engine.server.overload import Refusals
from dqe_engine.server.settings import ServerSettings


class Room:
    """For two, counted by nobody but the refusals."""

    def full(self, coming: int = 0) -> bool:
        return coming >= 2


def refusals() -> Refusals:
    settings = ServerSettings(Path("bundle"), Path("index"), log="error")
    return Refusals(settings, Metrics(settings), Room())


def test_those_whose_tasks_have_not_run_yet_count() -> None:
    async def main() -> None:
        refuses, loop = refusals(), asyncio.get_running_loop()
        for _ in range(2):
            assert refuses([]) is None
            refuses.admitted(loop)
        assert refuses([]) is not None  # in the same turn of the loop, so that no task is made for it
        await asyncio.sleep(0)
        assert refuses([]) is None

    asyncio.run(main())


def test_the_answer_is_as_long_as_it_says_whatever_the_id() -> None:
    async def main() -> None:
        refuses, loop = refusals(), asyncio.get_running_loop()
        refuses.admitted(loop)
        refuses.admitted(loop)
        for given in ([], [(b"x-request-id", b"a")], [(b"x-request-id", b"b" * 64)], [(b"x-request-id", b"%s %d")]):
            answer = refuses(given)
            assert answer is not None
            head, _, body = answer.partition(b"\r\n\r\n")
            headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
            error = json.loads(body)["error"]
            assert head.startswith(b"HTTP/1.1 429 ")
            assert int(headers[b"content-length"]) == len(body)
            assert headers[b"x-request-id"].decode() == error["request_id"]
            assert error["code"] == "queue_full"
            chosen = given[0][1].decode() if given and b"%" not in given[0][1] else None
            assert chosen in (None, error["request_id"])

    asyncio.run(main())
