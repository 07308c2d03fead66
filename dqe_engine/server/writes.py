"""`Writes`: items added, described and removed by many callers, on the disk before any of them is told so; one save for all that wait."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dqe_engine.bundle import Bundle
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import DQEError, IndexConflictError, IndexFormatError, InputError, OverloadError, UnknownItemError
from dqe_engine.files import describe_os_error, describe_write_error, make_directories, try_directory_lock
from dqe_engine.forks import NotPickled
from dqe_engine.image_sources import Pixels
from dqe_engine.index import GalleryIndex, ImageStorage, Storage
from dqe_engine.index.storage import LOCK_FILE, MANIFEST_FILE
from dqe_engine.index.validation import check_ids, checked_metadata
from dqe_engine.preprocessing import fit_image, open_image

from .operations import BusyError, ItemExistsError, Metadata, Operation, Removal, Written, deadline_in, too_late
from .photos import Photos, content_of

_ENCODED_AT_ONCE = 32
_POLL_SECONDS = 0.004

_log = logging.getLogger(__name__)


class Writes(NotPickled):
    """Writes to the index in a folder, for any number of threads and tasks of this process; other processes may have one of their own for
    the same folder, and `dqe-index` may run.

    All operations that wait are written together: images are encoded, the index's folder is locked (`directory_lock`), what others saved
    is read, the operations are done in the order in which they came, and the index is saved once. One that cannot be done fails alone. A
    save that fails fails its group, whose changes are then given up: this object has an index of its own, which is dropped and loaded
    again for the next group, so that searches see what was saved and nothing else.

    An uploaded image is stored before the save and deleted after one that dropped the last item with its content, or did not come to have
    one; `sweep_uploads` deletes what kills and failures of saves left. An uploads folder belongs to one index.
    """

    instead = "make one in the other process"

    def __init__(
        self,
        index: Path,
        engine: RetrievalEngine,
        photos: Photos | None = None,
        *,
        removing: Callable[[Sequence[Removal]], None] = lambda removals: None,
        saved: Callable[[], None] = lambda: None,
        most: int = 64,
        room: int = 256,
        room_bytes: int = 256 << 20,
        patience: float = 2.0,
        decode_threads: int = 2,
    ) -> None:
        """index: the folder of a saved index (see `make_index`). engine: whose model encodes; its own index is left alone. photos: where
        images are kept; None to keep none. removing: called with the lock, before a save that removes or replaces items; should it raise,
        nothing is saved. saved: called after each save, before anybody is told. most: operations in a save. room,
        room_bytes: operations that may wait, and their images' bytes together; more is an OverloadError. patience: seconds to wait for
        the lock."""
        self._path, self._engine, self._photos = Path(index).absolute(), engine, photos
        self._removing, self._saved = removing, saved
        self._most, self._room, self._room_bytes, self._patience = most, room, room_bytes, patience
        self._threads = decode_threads
        self._arrived = threading.Condition()  # guards what follows
        self._queue: deque[Operation] = deque()
        self._bytes = 0  # of images, waiting or in work
        self._closed = False
        self._worker: threading.Thread | None = None
        self._index: GalleryIndex | None = None  # the worker's alone

    @property
    def waiting(self) -> int:
        """Operations in the queue."""
        return len(self._queue)

    def add(
        self, id: str, image: bytes, metadata: Metadata = None, *, replace: bool = False, timeout: float | None = None
    ) -> Future[Written]:
        """An item made of the bytes of an image file; with `replace`, all that was known under its id is gone.

        Raises InputError for an id or metadata that cannot be, OverloadError where too many wait. The future raises InputError for an
        image that is refused, ItemExistsError, DeadlineError where its turn had not come within `timeout` seconds, BusyError, UploadError,
        and IndexFormatError where the disk refuses (its `__cause__` is then an OSError; the save may have come as far as the disk all the
        same). Cancelling it takes the operation out of the queue, until its turn has come.
        """
        check_ids([id])
        if not isinstance(image, bytes):
            raise InputError(f"image: expected the bytes of a file, got {type(image).__name__}")
        return self._submit(Operation("add", id, deadline_in(timeout), checked_metadata(id, metadata), image, replace))

    def update(self, id: str, metadata: Metadata, *, timeout: float | None = None) -> Future[Written]:
        """Other metadata for an item, in place of all that it had. Raises as `add`, and UnknownItemError."""
        check_ids([id])
        return self._submit(Operation("update", id, deadline_in(timeout), checked_metadata(id, metadata)))

    def remove(self, id: str, *, timeout: float | None = None) -> Future[Written]:
        """No such item any more, nor its upload, unless another item has the same. Raises as `update`."""
        check_ids([id])
        return self._submit(Operation("remove", id, deadline_in(timeout)))

    def close(self) -> None:
        """Finish what waits, then end; whoever asks after that gets an OverloadError. May be called twice."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
            worker = self._worker
        if worker is not None:
            worker.join()

    def _submit(self, operation: Operation) -> Future[Written]:
        self._enqueue(operation, len(operation.data))
        return operation.future

    def _enqueue(self, entry: Operation, size: int) -> None:
        with self._arrived:
            if self._closed:
                raise OverloadError("the server is shutting down and writes no more; ask again later, or another server")
            if len(self._queue) >= self._room or (self._bytes and self._bytes + size > self._room_bytes):
                raise OverloadError(f"{len(self._queue)} changes of {self._bytes >> 20} MiB wait to be written already; ask again later")
            self._queue.append(entry)
            self._bytes += size
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="writes", daemon=True)
                self._worker.start()
            self._arrived.notify_all()

    # -- by the worker alone -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with ThreadPoolExecutor(self._threads, thread_name_prefix="writes-decode") as pool:
            while (entries := self._next()) is not None:
                wanted = [entry for entry in entries if entry.future.set_running_or_notify_cancel()]
                try:
                    self._commit(self._prepare(wanted, pool))
                except BaseException as error:  # of our own making; nobody else would tell those who wait
                    _log.exception("writing failed")
                    self._drop()
                    for entry in wanted:
                        if not entry.future.done():
                            entry.future.set_exception(error)
                with self._arrived:
                    self._bytes -= sum(len(entry.data) for entry in entries)
        self._drop()

    def _next(self) -> list[Operation] | None:
        """Operations that are to be written together; None once there will be no more."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._queue or self._closed)
            entries = [self._queue.popleft() for _ in range(min(len(self._queue), self._most))]
            return entries or None

    def _prepare(self, operations: Sequence[Operation], pool: ThreadPoolExecutor) -> list[Operation]:
        """Encode what is to be added and store its image. Operations that can be done, in their order."""
        adds = [operation for operation in operations if operation.kind == "add"]
        failed: dict[Operation, Exception] = {}
        pixels: dict[Operation, Pixels] = {}
        for operation, found in zip(adds, pool.map(self._read, adds), strict=True):
            if isinstance(found, Exception):
                failed[operation] = found
            else:
                pixels[operation] = found
        readable = list(pixels)
        for start in range(0, len(readable), _ENCODED_AT_ONCE):
            batch = readable[start : start + _ENCODED_AT_ONCE]
            try:
                encoded = self._engine.encode_pixels([pixels.pop(operation) for operation in batch])
            except Exception as error:
                failed |= dict.fromkeys(batch, error)
                continue
            for operation, target, image in zip(batch, encoded.target_tokens, encoded.image_tokens, strict=True):
                operation.tokens = (target[None], image[None])  # (1, M, D), (1, P, Hv)
        for operation, reason in failed.items():
            operation.future.set_exception(reason)
        return [operation for operation in operations if operation not in failed]

    def _read(self, operation: Operation) -> Pixels | Exception:
        spec, policy = self._engine.bundle.manifest.preprocessing, self._engine.image_policy
        try:
            if operation.is_late:
                return too_late()
            pixels = fit_image(open_image(operation.data, spec, policy), spec)
            operation.content = content_of(operation.data) if self._photos is None else self._photos.store(operation.data)
            return pixels
        except Exception as error:
            return error

    def _commit(self, operations: Sequence[Operation]) -> None:
        if not operations:
            return
        outcomes: dict[Operation, Written | DQEError]
        try:
            self._current()  # a large index takes seconds to load, for which nobody should wait
            with self._held():
                outcomes = self._write(operations)
        except Exception as error:
            self._drop()
            for operation in operations:
                operation.future.set_exception(error)
            return
        if any(isinstance(outcome, Written) for outcome in outcomes.values()):
            try:
                self._saved()
            except Exception:
                _log.exception("a callback after a save failed")
        for operation, outcome in outcomes.items():
            if isinstance(outcome, Written):
                operation.future.set_result(outcome)
            else:
                operation.future.set_exception(outcome)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock of the index's folder. Raises BusyError where another process keeps it, IndexFormatError."""
        until = time.monotonic() + self._patience
        with contextlib.ExitStack() as held:
            while True:
                try:
                    if held.enter_context(try_directory_lock(self._path)) and _is_free(self._path / LOCK_FILE):
                        break
                except OSError as error:
                    raise IndexFormatError(describe_os_error(error, self._path)) from error
                held.close()
                if time.monotonic() >= until:
                    raise BusyError(f"{self._path} is being written by another process; ask again later", max(1.0, self._patience))
                time.sleep(_POLL_SECONDS * (0.5 + random.random()))
            yield

    def _write(self, operations: Sequence[Operation]) -> dict[Operation, Written | DQEError]:
        """With the lock. What became of each. Raises what a save does, or the reading before it."""
        try:
            return self._write_once(operations)
        except IndexConflictError:  # one that does not know of our lock, between our reading and our save
            self._drop()
            return self._write_once(operations)

    def _write_once(self, operations: Sequence[Operation]) -> dict[Operation, Written | DQEError]:
        index = self._current()
        failed: dict[Operation, DQEError] = {}
        dropped: set[str] = set()
        removed: list[tuple[str, bool, str | None]] = []  # id, whether another image follows, what the item was made from
        done: list[Operation] = []
        for operation in operations:
            row = (now := index.snapshot()).row(operation.id)
            before = None if row is None else now.content(row)
            try:
                self._apply(index, operation, exists=row is not None)
            except DQEError as error:
                failed[operation] = error
                if operation.content is not None:
                    dropped.add(operation.content)  # stored before it failed
                continue
            done.append(operation)
            if operation.kind == "remove" or (operation.kind == "add" and row is not None):
                removed.append((operation.id, operation.kind == "add", before))
            if operation.kind == "update":
                operation.content = before
            elif before is not None:
                dropped.add(before)
        unused = self._unused_uploads(index, dropped)
        if removed:
            self._removing([Removal(id, content in unused, replaced) for id, replaced, content in removed])
        if done:
            index.save(self._path)
        self._delete_uploads(unused)
        revision = index.stats().revision or ""
        written = {operation: Written(operation.id, operation.content, revision) for operation in done}
        return {operation: failed[operation] if operation in failed else written[operation] for operation in operations}

    def _apply(self, index: GalleryIndex, operation: Operation, *, exists: bool) -> None:
        """To the index in memory. Raises DQEError where it cannot be done."""
        if operation.is_late:
            raise too_late()
        if operation.kind != "add" and not exists:
            raise UnknownItemError(f"{operation.id[:200]!r} is not in the index")
        if operation.kind == "update":
            index.update_metadata({operation.id: operation.metadata})
        elif operation.kind == "remove":
            index.remove([operation.id])
        else:
            if exists and not operation.replace:
                raise ItemExistsError(f"{operation.id[:200]!r} is in the index already; remove it, or ask for it to be replaced")
            if self._photos is not None and not self._photos.has_upload(operation.content):
                self._photos.store(operation.data)  # another process removed the last item with it, meanwhile
            assert operation.tokens is not None
            target, image = operation.tokens
            kept = None if index.image_storage == "none" else image
            index.add([operation.id], target, kept, [operation.metadata], contents=[operation.content], replace=operation.replace)

    def _unused_uploads(self, index: GalleryIndex, dropped: set[str]) -> set[str]:
        """Those of `dropped` that are stored, and that no item has (any more)."""
        photos = self._photos
        if photos is None or not (stored := {content for content in dropped if photos.has_upload(content)}):
            return set()
        return stored - index.snapshot().contents_among(stored)

    def _delete_uploads(self, unused: set[str]) -> None:
        """What cannot be deleted stays (`sweep_uploads`). An upload that another process has just stored for an item of its own is stored
        again by it: see `_apply`."""
        for content in unused:
            assert self._photos is not None
            try:
                self._photos.remove(content)
            except DQEError as error:
                _log.warning("an upload that no item refers to stays for now: %s", error)

    def _current(self) -> GalleryIndex:
        """The index as it is on the disk. Raises IndexFormatError."""
        if self._index is not None:
            try:
                self._index.refresh()
                return self._index
            except IndexFormatError:  # another index may have been put in its place
                self._drop()
        self._index = GalleryIndex.load(self._path, model_hash=self._engine.bundle.model_hash, screened=False)
        return self._index

    def _drop(self) -> None:
        """What was changed and not saved is gone."""
        if self._index is not None:
            self._index.close()
            self._index = None


def make_index(bundle: Bundle, index: Path, *, storage: Storage = "f32", image_storage: ImageStorage = "f16") -> bool:
    """An empty index of the bundle's model in the folder `index`, where there is none yet; whether it was made.

    Processes may call it at the same time. Raises IndexConflictError for a folder that holds other things, IndexFormatError.
    """
    path = Path(index).absolute()
    if (path / MANIFEST_FILE).exists():
        return False
    try:
        make_directories(path)
    except OSError as error:
        raise IndexFormatError(describe_write_error(error, path)) from error
    made = GalleryIndex.for_bundle(bundle, storage=storage, image_storage=image_storage)
    try:
        made.save(path)
    except IndexConflictError:
        if (path / MANIFEST_FILE).exists():  # another process was faster
            return False
        raise
    return True


def _is_free(lock: Path) -> bool:
    """Whether nobody holds this lock of a save, which waits for it without an end."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # missing, or no concern of ours: the save says what is wrong
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
