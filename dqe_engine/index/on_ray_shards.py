"""Sharded serving on Ray: an actor for each shard, on whatever machine has room. All of them must see the folder under the same path.

    from dqe_engine.index.on_ray_shards import open_on_ray
    engine.attach(open_on_ray("/shared/shards", on_loss="partial"))    # searches as before; `result.lost` names shards without an answer

Ray starts an actor again that died with its process or its machine; it opens its shard when it is asked next.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dqe_engine import __version__
from dqe_engine.errors import InputError

from .ray_cluster import connect
from .shard_files import read_shards
from .shard_server import Reply, ShardServer
from .sharded import ShardedIndex
from .transports import Call, Lost, too_late

NAMESPACE = "dqe"
_OPENING = "opening"
"""Threads of an actor for calls that open a shard: else those of several processes would take all, and searches wait for minutes."""


class RayTransport:
    """Shard servers as actors. Those of a `name` are shared by all processes that give it, and outlive them."""

    def __init__(self, root: Path, model_hash: str, *, name: str | None, cpus: float, concurrency: int, **options: Any) -> None:
        self._ray = connect("sharded serving")
        self._name, self._arguments = name, (str(root), model_hash)
        self._keywords = options
        told = repr((__version__, str(root), model_hash, cpus, concurrency, sorted(options.items())))
        # Else actors of another folder or other options would be found, or ones that run the code of another version.
        self._digest = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
        self._class = self._ray.remote(concurrency_groups={_OPENING: 1})(ShardServer)
        self._options = {
            "num_cpus": cpus, "max_concurrency": concurrency, "max_restarts": -1, "max_task_retries": 0, "scheduling_strategy": "SPREAD",
        }  # fmt: skip
        self._actors: dict[int, Any] = {}

    def ask(self, calls: Sequence[Call], timeout: float) -> list[Reply | Lost]:
        try:
            asked = [self._begun(slot, arguments) for slot, arguments in calls]
            ready, _ = self._ray.wait(asked, num_returns=len(asked), timeout=timeout) if asked else ([], [])
        except self._ray.exceptions.RayError as error:  # of the cluster, not of an actor
            return [Lost(_one_line(error)) for _ in calls]
        done = set(ready)
        for one in asked:
            if one not in done:
                self._ray.cancel(one)  # where it waits behind others in the actor, nobody works on it any more
        return [self._reply(slot, one, timeout, answered=one in done) for (slot, _), one in zip(calls, asked, strict=True)]

    def keep(self, names: Collection[str]) -> None:
        """Nothing: an actor lets go of a shard that nobody asks for, since others may share it."""

    def close(self) -> None:
        """Actors without a name end with the last handle; those with one stay, for others: see `stop`."""
        self._actors.clear()

    def actor(self, slot: int) -> Any:
        """The handle of a shard's actor, which is started where there is none."""
        if slot not in self._actors:
            named = {} if self._name is None else {
                "name": f"{self._name}-{self._digest}-{slot:03}", "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True,
            }  # fmt: skip
            self._actors[slot] = self._class.options(**self._options, **named).remote(*self._arguments, **self._keywords)
        return self._actors[slot]

    def _begun(self, slot: int, arguments: tuple[Any, ...]) -> Any:
        call = self.actor(slot).call
        return (call.options(concurrency_group=_OPENING) if arguments[0] == "open" else call).remote(*arguments)

    def _reply(self, slot: int, one: Any, timeout: float, *, answered: bool) -> Reply | Lost:
        if not answered:
            return too_late(timeout)
        try:
            reply: Reply = self._ray.get(one)
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.ActorDiedError):
                self._actors.pop(slot, None)  # Ray has given it up; the next search starts another
            return Lost(_one_line(error))
        return reply


def open_on_ray(
    path: str | os.PathLike[str],
    *,
    screened: bool | None = None,
    mapped: bool = True,
    threads: int = 1,
    concurrency: int = 4,
    name: str | None = None,
    **options: Any,
) -> ShardedIndex:
    """The sharded index `path`, one actor for each shard, on the cluster of RAY_ADDRESS, or one that is started here.

    threads: processors of one search, which an actor also asks Ray for. concurrency: searches that an actor runs at the same time. name: of
    actors that several processes share, where they give the same options, and that outlive them; `stop` ends them. options: `on_loss`,
    `timeout` and `spare`, see `ShardedIndex`; `screened` and `mapped`: see `GalleryIndex.load`. Raises IndexFormatError, and BackendError
    without Ray or without an answer.
    """
    if threads < 1 or concurrency < 1:
        raise InputError(f"threads and concurrency are at least 1, got {threads} and {concurrency}")
    root = Path(path).absolute()
    model_hash = read_shards(root).model_hash
    transport = RayTransport(
        root, model_hash, name=name, cpus=threads, concurrency=concurrency, screened=screened, mapped=mapped, threads=threads
    )
    try:
        return ShardedIndex(root, transport, **options)
    except BaseException:
        transport.close()
        raise


def stop(name: str) -> int:
    """End the actors that were opened under this name. How many there were."""
    ray = connect("sharded serving")
    found = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].rsplit("-", 2)[0] == name
    ]
    for actor in found:
        ray.kill(ray.get_actor(actor, namespace=NAMESPACE))
    return len(found)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
