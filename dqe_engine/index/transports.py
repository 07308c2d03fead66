"""Where shard servers are asked: `HereTransport` in this process; Ray's is in `on_ray_shards`. `Sparing` waits for none that was late."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from dqe_engine.processors import be_as_nice_as, niceness_here

from .shard_server import Reply, ShardServer

MOST_LATE = 4
"""Calls of one shard in this process that may be late and still run; more are not begun, since each holds a thread."""


@dataclass(frozen=True)
class Lost:
    """In the place of a shard's answer: why there is none. late: there may be one still, for who waits longer."""

    reason: str
    late: bool = False


def too_late(timeout: float) -> Lost:
    return Lost(f"nothing came within {timeout:g} s", late=True)


Call = tuple[int, tuple[Any, ...]]
"""A slot, and the arguments of `ShardServer.call`."""


class Transport(Protocol):
    """Where the shard servers are. `slot`: one of them; shard n of a set is asked of slot n."""

    def ask(self, calls: Sequence[Call], timeout: float) -> list[Reply | Lost]:
        """`ShardServer.call` with these arguments at these slots, all at the same time; the answers in the order of `calls`."""

    def keep(self, names: Collection[str]) -> None:
        """No shards of other names are asked for any more."""

    def close(self) -> None: ...


class HereTransport:
    """Shard servers in this process, in threads: for tests, and for an index that was cut and fits one machine after all. Shards that were
    cut anew are opened beside those of before, which answer until `keep`."""

    def __init__(self, root: Path, model_hash: str, *, niceness: int = 0, **options: Any) -> None:
        """niceness: of the threads, whoever starts them, above that of this one. options: of `ShardServer`."""
        self._make = partial(ShardServer, str(root), model_hash, **options)
        self._servers: dict[str, ShardServer] = {}  # by the shard's name
        self._late: dict[int, list[Future[Reply]]] = {}
        self._counting = Lock()
        self._threads = ThreadPoolExecutor(64, "dqe-shard", be_as_nice_as, (niceness_here() + niceness,))

    def ask(self, calls: Sequence[Call], timeout: float) -> list[Reply | Lost]:
        asked = [self._begun(slot, arguments) for slot, arguments in calls]
        done, late = wait([one for one in asked if one is not None], timeout)
        for (slot, _), one in zip(calls, asked, strict=True):
            if one in late and one is not None and not one.cancel():  # it has begun, so its thread goes on to the end
                with self._counting:
                    self._late.setdefault(slot, []).append(one)
        return [one.result() if one in done and one is not None else too_late(timeout) for one in asked]

    def keep(self, names: Collection[str]) -> None:
        for name in {*self._servers} - {*names}:
            self._servers.pop(name, None)

    def close(self) -> None:
        self._servers.clear()
        self._threads.shutdown(wait=False)

    def _begun(self, slot: int, arguments: tuple[Any, ...]) -> Future[Reply] | None:
        """None for a shard whose earlier calls hang."""
        with self._counting:
            self._late[slot] = [one for one in self._late.get(slot, ()) if not one.done()]
            if len(self._late[slot]) >= MOST_LATE:
                return None
            if (server := self._servers.get(arguments[1])) is None:
                server = self._servers[arguments[1]] = self._make()
        return self._threads.submit(server.call, *arguments)


class Sparing:
    """A transport that asks no shard that was late, until a look finds that it answers: one that hangs costs a server's callers one
    timeout, and not each of them one in every round."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._lock = Lock()
        self._late: dict[str, Lost] = {}  # by the shard's name; replaced with the lock, never changed, so it is read without

    def ask(self, calls: Sequence[Call], timeout: float) -> list[Reply | Lost]:
        late = self._late
        asked = [call for call in calls if call[1][1] not in late]
        replies = dict(zip([name for _, (_, name, *_) in asked], self.transport.ask(asked, timeout), strict=True)) if asked else {}
        if new := {name: reply for name, reply in replies.items() if isinstance(reply, Lost) and reply.late}:
            with self._lock:
                self._late = {**self._late, **_spared(new)}
        return [replies[name] if name in replies else late[name] for _, (_, name, *_) in calls]

    def found(self, lost: dict[str, Lost]) -> None:
        """What a look at all shards found: those of these names give no answer."""
        with self._lock:
            self._late = _spared({name: one for name, one in lost.items() if one.late})

    def keep(self, names: Collection[str]) -> None:
        self.transport.keep(names)

    def close(self) -> None:
        self.transport.close()


def _spared(late: dict[str, Lost]) -> dict[str, Lost]:
    return {name: replace(one, reason=f"{one.reason}, and it is not waited for since") for name, one in late.items()}
