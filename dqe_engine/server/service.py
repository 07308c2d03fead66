"""`Service`: what the routes share. One engine, its batcher, and an index that follows its files."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, TypeVar, cast

from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import DQEError, NoAnswerError, OverloadError
from dqe_engine.files import describe_write_error
from dqe_engine.image_policy import SNIFFED
from dqe_engine.index.elsewhere import is_elsewhere, open_elsewhere
from dqe_engine.index.searched import Ability, Health, SearchedIndex
from dqe_engine.processors import available_cpus, give_way
from dqe_engine.query import Query
from dqe_engine.query_batcher import QueryBatcher
from dqe_engine.results import IndexState, SearchResult
from dqe_engine.sessions import Provider

from .keys import Keyring
from .metrics import Metrics
from .offers import not_offered, problem_of_lack
from .operations import Removal, Written
from .photos import SIZES, NoPhotoError, Photos, Thumbnail
from .problems import GoneError, Problem
from .removed import Removed, removed_beside
from .settings import ServerSettings
from .threads import Threads
from .turns import Turns
from .writes import Writes

log = logging.getLogger("dqe_engine.server")
FOLLOWED_EVERY = 0.1
"""Seconds between two looks at the index's manifest: a `stat`, and a refresh where it changed."""
WATCHED_EVERY = 3.0
"""Seconds between two looks at the parts of an index that lies elsewhere: each is a search of nothing in particular."""
MEASURED_EVERY = 5
"""Looks between two times that gauges are brought up to date: another worker may be the one that is asked for them."""
MOST_UPLOADS = 32
"""Uploaded images that a process holds in memory at once; one more is an OverloadError. Those that still arrive are in files."""
MOST_DECODED = 8
"""Images that are decoded at once, at most: each may take 240 MiB."""
MOST_RENDERED = 4
"""Thumbnails that are made at once, at most and no more than there are processors: each may take 240 MiB."""
MOST_DEADLINE_MS = 600_000
SWITCH_S = 0.0002
"""Seconds for which a thread that runs Python keeps another waiting. At Python's 0.005, the event loop would wait that long for the thread
that searches after each system call that lets go of the interpreter, as each new connection makes some."""
MOST_BEGUN = 8
"""Searches that begin in one turn of the event loop. With two while others are refused, a third fewer were answered."""
T = TypeVar("T")


class Service:
    """Made in the process that serves (see `dqe_engine.forks`), by `open`, before the first request. `close` ends it."""

    def __init__(self, settings: ServerSettings, metrics: Metrics, *, niceness: int = 0) -> None:
        """`niceness`: of the threads that search and decode (see `give_way`)."""
        self.settings, self.metrics, self._niceness = settings, metrics, niceness
        self.phase = "starting"
        self.following, self._behind = True, False
        self._refreshing = threading.Lock()
        self.lacks: Mapping[Ability, str] = {}
        self.health = Health()
        self.index = IndexState(0, None)
        """What a search would search now."""
        self._writes: Writes | None = None
        self.keyring = Keyring(settings.keys)
        self._followed = 0
        self._searching, self._most_searching = 0, settings.room + settings.most  # those that wait, and those of the batch that runs
        self.turn = Turns(MOST_BEGUN)
        self._short = Threads(ThreadPoolExecutor(4, "dqe-serve"))  # pictures that are kept, counts, metrics
        self._asking = Threads(ThreadPoolExecutor(4, "dqe-serve-ask"), deadline_s=settings.deadline_s)  # for what lies elsewhere
        self._rendering = Threads(ThreadPoolExecutor(min(MOST_RENDERED, available_cpus()), "dqe-serve-picture", give_way, (niceness,)))
        self._uploads = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Load the bundle and the index, and warm up. Raises DQEError."""
        settings = self.settings
        sys.setswitchinterval(SWITCH_S)
        shared = await asyncio.to_thread(self._open_elsewhere)  # what it starts, such as Ray, gives way to nobody
        with ThreadPoolExecutor(1, "dqe-serve-load", give_way, (self._niceness,)) as loader:  # ONNX Runtime's threads begin in it
            self.engine = await asyncio.get_running_loop().run_in_executor(loader, self._load, shared)
        readers = min(MOST_DECODED, available_cpus())
        self.batcher: QueryBatcher = self.engine.batcher(
            most=settings.most, room=settings.room, readers=readers, niceness=self._niceness, counts=self.metrics.batch
        )
        self.lacks = self.engine.attached.lacks
        changes = "write" not in self.lacks
        self.photos = Photos(settings.photos, settings.uploads_folder if changes else settings.uploads, policy=self.engine.image_policy)
        self.removed = Removed(removed_beside(Path(settings.index)))
        if changes:
            self._writes = Writes(settings.index, self.engine, self.photos, removing=self._remember, saved=self._refresh)
        await asyncio.to_thread(self._look)
        await asyncio.to_thread(self._look_at_parts)
        self._tasks += [asyncio.create_task(self._keep()), asyncio.create_task(self._follow())]
        if not self.engine.attached.at_hand:
            self._tasks.append(asyncio.create_task(self._watch()))
        self.phase = "ready"

    async def close(self) -> None:
        """Finish what is queued, then let go."""
        self.phase = "draining"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._writes is not None:
            await asyncio.to_thread(self._writes.close)
        await asyncio.to_thread(self.batcher.close)
        for threads in (self._short, self._asking, self._rendering):
            threads.close()
        self.engine.close()
        self.metrics.close()

    @property
    def writes(self) -> Writes:
        """Raises Problem for an index that takes none."""
        if self._writes is None:
            raise problem_of_lack(self.lacks, "write", "/v1/items/{id}")
        return self._writes

    def not_offered(self, method: str, path: str) -> Problem | None:
        """The answer to a request that needs what the index cannot do."""
        return not_offered(self.lacks, method, path)

    def _look(self) -> None:
        now = self.engine.searched.snapshot()
        self.index = IndexState(now.count, now.revision)
        self._followed += 1
        self.metrics.index(now.count, self._followed, now.revision or "")

    def _look_at_parts(self) -> None:
        before, self.health = self.health, self.engine.attached.look()
        self.metrics.parts(self.health.parts, len(self.health.lost))
        for name, reason in zip(self.health.lost, self.health.reasons, strict=True):
            if name not in before.lost:
                log.error("no answer from part %s of the index: %s", name, reason)
        if back := sorted({*before.lost} - {*self.health.lost}):
            log.warning("these parts of the index answer again: %s", ", ".join(back))

    def _refresh(self) -> None:
        """Take up what was saved, so that whoever wrote it finds it from now on. One at a time: of two copies that are made for devices at
        once, the older might be the last that is done."""
        with self._refreshing:
            if self.engine.attached.refresh():
                self._behind = True
            if self._behind:
                if self.settings.devices:
                    self.engine.search_on(self.settings.devices)  # fails where a device has no room for both; the next turn tries again
                self._behind = False
                self._look()

    def _load(self, shared: SearchedIndex | None) -> RetrievalEngine:
        settings = self.settings
        engine = RetrievalEngine.load(settings.bundle, provider=cast(Provider, settings.provider), threads=_threads(settings))
        if shared is None:
            engine.load_index(settings.index)
            engine.search_on(settings.devices)
        else:
            engine.attach(shared)
        engine.warm_up()
        return engine

    def _open_elsewhere(self) -> SearchedIndex | None:
        """None for an index of this process. Shards and databases may be silent for half of what a search may take, so that there is time
        left for an answer without them."""
        settings = self.settings
        if not is_elsewhere(settings.index):
            return None
        threads, at_most = _threads(settings) or 0, settings.deadline_s / 2
        return open_elsewhere(settings.index, threads=threads, at_most=at_most, spare=True, niceness=self._niceness)

    def ready(self) -> bool:
        return self.phase == "ready"

    def full(self, coming: int = 0) -> bool:
        return self._searching + len(self.turn) + coming >= self._most_searching

    async def picture(self, id: str, content: str | None, size: int) -> Thumbnail:
        """`Photos.thumbnail`. What has to be made waits for others that are, and nothing else waits for it. Raises OverloadError too."""
        kept = await self.in_thread(self.photos.kept, id, content, size)
        if kept is not None:
            return kept
        return await self._rendering.do(self.photos.thumbnail, id, content, size)

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """For what would hold up the event loop, and is short. Raises OverloadError where much waits already."""
        return await self._short.do(work, *arguments)

    async def of_index(self, work: Callable[..., T], *arguments: Any) -> T:
        """For what a snapshot of the index is asked. Shards and databases may be slow or silent: they have threads of their own, so that
        nothing else waits behind them, and a deadline. Raises OverloadError, and DeadlineError."""
        return await (self._short if self.engine.attached.at_hand else self._asking).do(work, *arguments)

    def deadline(self, headers: Mapping[str, str]) -> float:
        """Seconds for an answer: the server's, or what the request's X-Deadline-Ms says, if that is less. Raises Problem."""
        given = headers.get("x-deadline-ms")
        if given is None:
            return self.settings.deadline_s
        if not (given.isascii() and given.isdigit() and 1 <= int(given[:7]) <= MOST_DEADLINE_MS and len(given) <= 6):
            raise Problem(422, "invalid", f"X-Deadline-Ms: expected a whole number from 1 to {MOST_DEADLINE_MS}, got {given[:20]!r}")
        return min(self.settings.deadline_s, int(given) / 1000)

    def check_image(self, data: bytes) -> None:
        """Raises Problem 415 for a format that is not taken."""
        if self.engine.image_policy.recognise(data[:SNIFFED]) is None:
            formats = ", ".join(self.engine.image_policy.usable_formats)
            raise Problem(415, "image_format", f"the file is none of {formats}; convert it to one of them")

    async def write(self, operation: Callable[..., Future[Written]], *arguments: Any, **options: Any) -> Written:
        """What `Writes` says, once it is on the disk. Raises what it does."""
        return await asyncio.wrap_future(operation(*arguments, timeout=self.settings.deadline_s, **options))

    def _remember(self, removals: Sequence[Removal]) -> None:
        """Items whose photo lies in a folder, or may lie there: updates leave it out from now on. Raises Problem: nothing is saved then."""
        removals = [removal for removal in removals if self._may_have_photo(removal)]
        try:
            known = self.removed.ids() if any(removal.replaced for removal in removals) else frozenset()
            if ids := [removal.id for removal in removals if not (removal.replaced and removal.id in known)]:
                self.removed.add(ids)
        except OSError as error:
            log.error("nothing is saved: %s", describe_write_error(error, self.removed.file))
            message = "the removal cannot be recorded beside the index, so nothing was changed; tell whoever runs the server"
            raise Problem(507, "disk", message) from error

    def _may_have_photo(self, removal: Removal) -> bool:
        """Whether a photo may lie under the name of this item in a folder, also one that is away now. In place of an upload that goes with
        its item, one lies there only where it is seen, or where the upload replaced it, and then its id is remembered since."""
        if not removal.uploaded:
            return True
        if not self.settings.photos:
            return False
        try:
            self.photos.etag(removal.id, None, SIZES[0])
        except NoPhotoError:
            return False
        except OverloadError:  # it could not be looked
            return True
        return True

    @contextlib.contextmanager
    def upload(self) -> Iterator[None]:
        """While an uploaded image is in memory. Raises OverloadError."""
        if self._uploads >= MOST_UPLOADS:
            raise OverloadError(f"{self._uploads} images are being worked on already; ask again in a moment")
        self._uploads += 1
        try:
            with self.metrics.upload():
                yield
        finally:
            self._uploads -= 1

    def measure(self) -> None:
        """Bring those numbers up to date that are read where they are kept."""
        self.metrics.queue(self.batcher.waiting)
        self.metrics.ready(self.ready())
        self.metrics.following(self.following)
        for name, stats in self.engine.remembered.items():
            self.metrics.cache(name, hits=stats.hits, misses=stats.misses)

    async def search(self, query: Query, *, deadline_s: float, gone: Awaitable[Any]) -> SearchResult:
        """The engine's answer. `gone` is done when nobody waits any more: the query leaves the queue. Raises InputError, OverloadError,
        DeadlineError, and GoneError."""
        self._searching += 1
        try:
            result = await unless(gone, self.batcher.search_async(query, timeout=deadline_s))
        finally:
            self._searching -= 1
        self.metrics.stages(result.timings_ms)
        if not result.exact:
            self.metrics.incomplete("lost" if result.lost else "unproved")
        return result

    async def _follow(self) -> None:
        """Take up what other processes save. An index that cannot be read is told, and the last good one goes on being searched."""
        watched, seen = self.engine.attached.watched, None
        while watched is not None:
            await asyncio.sleep(FOLLOWED_EVERY)
            try:
                status = watched.stat()
                state = (status.st_ino, status.st_mtime_ns, status.st_size)
                if state != seen:
                    await asyncio.to_thread(self._refresh)
                seen, self.following = state, True
            except Exception as error:
                if self.following:
                    expected = isinstance(error, DQEError | OSError)  # else a bug, or an error of a client's own
                    log.error("changes of the index cannot be read: %s", error, exc_info=None if expected else error)
                self.following = False
                await asyncio.sleep(1.0)

    async def _keep(self) -> None:
        """Measure, and end where the parent process is gone; also while shards are being opened, which takes minutes."""
        started_by = parent_process()  # that process may be gone already, so it is not whoever is the parent now
        parent = os.getppid() if started_by is None else started_by.pid
        for turn in itertools.count():
            await asyncio.sleep(FOLLOWED_EVERY)
            if turn % MEASURED_EVERY == 0:
                self.measure()
            if os.getppid() != parent and self.settings.workers > 1:
                log.error("the parent process is gone; this worker ends")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    async def _watch(self) -> None:
        """Ask the parts of the index, which lie elsewhere, whether they answer; and how much there is, where no file tells of changes."""
        while True:
            await asyncio.sleep(WATCHED_EVERY)
            try:
                await asyncio.to_thread(self._look_at_parts)
                if self.engine.attached.watched is None and self.health.answers:
                    with contextlib.suppress(NoAnswerError):  # the next look at the parts tells
                        await asyncio.to_thread(self._look)
            except Exception:  # a bug, or a client's that has none of its errors for it: the next look may fare better
                log.exception("the parts of the index cannot be checked")
                self.health = replace(self.health, answers=False)


def _threads(settings: ServerSettings) -> int | None:
    """Of a graph and of a search in each worker: together no more than there are processors, since threads that wait for one spin."""
    if settings.threads is not None or settings.workers == 1:
        return settings.threads
    return max(1, available_cpus() // settings.workers)


async def unless(gone: Awaitable[Any], work: Awaitable[T]) -> T:
    """What `work` gives, cancelled as soon as `gone` is done. Raises GoneError then."""
    answer, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise GoneError
    finally:
        for task in (answer, leaving):
            task.cancel()
