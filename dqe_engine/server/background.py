"""The index brought up to date with the photo folders while the server runs: a process of its own, `python -m
dqe_engine.server.background`, so that searches keep their processors and a crash is nobody else's.

Images are compared and encoded without any lock. Every `save_every` images or `save_seconds` the lock of `Writes` is taken, what others
saved is read, the images are added, and the index is saved: writes of the API get in between, and wait for no more than one such save.
Whoever changed or removed an item since it was compared wins. Stopped or killed, the next run goes on: what was saved equals its image.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dqe_engine.bundle import Bundle
from dqe_engine.errors import DQEError, IndexConflictError
from dqe_engine.files import describe_os_error, try_directory_lock
from dqe_engine.image_policy import DEFAULT_POLICY
from dqe_engine.image_sources import Pixels, find_images
from dqe_engine.index import GalleryIndex
from dqe_engine.index.metadata_file import read_metadata
from dqe_engine.indexer import Entry, Indexer, IndexingPlan, Pairs, metadata_for
from dqe_engine.results import EncodedImages, IndexingReport
from dqe_engine.sessions import Provider

from .photos import Photos
from .progress import Progress, born, write_progress
from .removed import Removed, removed_beside
from .writes import make_index

if TYPE_CHECKING:
    from dqe_engine.engine import RetrievalEngine

_BATCH = 16
_TOLD_EVERY = 0.25
_POLL_SECONDS = 0.01
_STOPPED_WITHIN = 3.0
_TRIES = 5
_NICE = 5
_LEFT_OUT = "removed from the index before (--readd takes them again)"

_log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """SIGTERM or SIGINT came; everything up to the last save is kept."""


class _Reporter:
    """Writes the state file, now and then, and stops the work when it was asked to."""

    def __init__(self, file: Path) -> None:
        self._file, self._told = file, 0.0
        self.stop = threading.Event()
        self.now = Progress(state="comparing", born=born(os.getpid()))
        self.tell()

    def tell(self, *, at_once: bool = True, **changes: Any) -> None:
        self.now = msgspec.structs.replace(self.now, **changes)
        if not at_once and time.monotonic() - self._told < _TOLD_EVERY:
            return
        self._told = time.monotonic()
        try:
            write_progress(self._file, self.now)
        except OSError as error:  # the work is worth more than the news of it
            _log.warning("%s", describe_os_error(error, self._file))

    def advance(self, done: int, total: int) -> None:
        """Raises Stopped."""
        self.tell(at_once=False, done=done, total=total)
        self.check()

    def check(self) -> None:
        """Raises Stopped."""
        if self.stop.is_set():
            raise Stopped


class FolderJob(msgspec.Struct, frozen=True, kw_only=True):
    """What `index_folder` is to do.

    - `bundle`, `index`: folders; an index that is missing is made at once.
    - `folders`: (prefix of the ids, folder of photos).
    - `state_file`: where the progress is written.
    - `metadata`: a file of it (see `read_metadata`), for images that are indexed now.
    - `uploads`: items whose image lies in this folder are left alone, whatever lies under their name in a folder of photos.
    - `readd`: take photos whose items the API removed; else they are left out and counted, until an item has their id.
    - `save_every`, `save_seconds`: the most images, and about the longest time, between two saves.
    """

    bundle: Path
    index: Path
    folders: tuple[tuple[str, Path], ...]
    state_file: Path
    metadata: Path | None = None
    uploads: Path | None = None
    readd: bool = False
    provider: Provider = "auto"
    threads: int | None = None
    save_every: int = 64
    save_seconds: float = 5.0

    def command(self) -> list[str]:
        """The command of a process that does the job; its exit code is 0 when all was done."""
        told = json.dumps(msgspec.to_builtins(self, enc_hook=str))  # msgspec's own JSON refuses paths that are not UTF-8
        return [sys.executable, "-m", "dqe_engine.server.background", told]

    @classmethod
    def told(cls, text: str) -> FolderJob:
        """The job in the last word of `command`."""
        return msgspec.convert(json.loads(text), cls, dec_hook=lambda kind, value: kind(value))


def index_folder(job: FolderJob) -> Progress:
    """Add to the index what is new in the folders or differs, and say in the state file how far that is; how it ended.

    Images that cannot be read are left out and counted. Items whose image is gone stay. In the main thread, SIGTERM and SIGINT end the
    work between two batches. Never raises but for what is no error of ours to catch.
    """
    reporter = _Reporter(job.state_file)
    try:
        with _signals(reporter.stop):
            given = {} if job.metadata is None else read_metadata(job.metadata)
            photos = Photos([], job.uploads)
            if job.readd:
                Removed(removed_beside(job.index.absolute())).clear()
            _Work(reporter, job, given, photos).run()
    except Stopped:
        done, total = reporter.now.done, reporter.now.total
        reporter.tell(state="failed", message=f"stopped after {done} of {total} images; it goes on at the next start")
    except (DQEError, OSError) as error:
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        reporter.tell(state="failed", message=message)
    except Exception as error:
        _log.exception("indexing failed")
        said = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        reporter.tell(state="failed", message=f"{said}; the server's log has the details")
    return reporter.now


class _Work:
    def __init__(self, reporter: _Reporter, job: FolderJob, metadata: Mapping[str, Entry], uploads: Photos) -> None:
        self.reporter, self.job, self.metadata, self.uploads = reporter, job, metadata, uploads
        self.path = job.index.absolute()
        self.removed = Removed(removed_beside(self.path))
        self.skipped: Counter[str] = Counter()
        self.engine: RetrievalEngine | None = None

    def run(self) -> None:
        self.bundle = Bundle.load(self.job.bundle)
        self.spec = self.bundle.manifest.preprocessing
        make_index(self.bundle, self.path)
        self.index = self._loaded()
        found = self._images()
        before = self.index.snapshot()
        removed = self.removed.ids()  # after the snapshot: whoever is gone from it is in there
        gone = {id for id, _ in found if id in removed and before.row(id) is None}
        found = [(id, image) for id, image in found if id not in gone]
        self._skip([_LEFT_OUT] * len(gone))
        seen = {id: None if row is None else (before.content(row),) for id, _ in found for row in [before.row(id)]}
        pairs = [(id, image) for id, image in found if (known := seen[id]) is None or not self.uploads.has_upload(known[0])]
        self.reporter.tell(total=len(pairs))
        plan = self._indexer(self.index).plan(pairs, on_error="skip", progress=self.reporter.advance)
        self._skip(image.kind for image in plan.report.skipped)
        added = self._embed(plan, seen)
        self.index.close()
        counts = f"{added} images indexed, {len(plan.report.unchanged)} were there"
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        message = f"{counts}, {self.skipped.total()} left out ({left_out})" if left_out else counts
        self.reporter.tell(state="done", message=message)

    def _loaded(self) -> GalleryIndex:
        return GalleryIndex.load(self.path, model_hash=self.bundle.model_hash, screened=False)

    def _indexer(self, index: GalleryIndex) -> Indexer:
        return Indexer(index, self._encode, self.spec, policy=DEFAULT_POLICY, threads=2)

    def _encode(self, pixels: Sequence[Pixels]) -> EncodedImages:
        """By a model that is loaded once there is something for it to do."""
        from dqe_engine.engine import RetrievalEngine

        if self.engine is None:
            self.engine = RetrievalEngine.load(self.job.bundle, provider=self.job.provider, threads=self.job.threads)
            if self.engine.bundle.model_hash != self.bundle.model_hash:
                raise IndexConflictError(f"{self.job.bundle} holds another model than at the start; start the server again")
        return self.engine.encode_pixels(pixels)

    def _images(self) -> Pairs:
        """Of all folders, each id once; where two have it, of the one that is named first."""
        images: dict[str, Any] = {}
        for prefix, folder in self.job.folders:
            found = find_images(folder)
            self.skipped.update(found.passed_over)
            for name, image in found.pairs:
                if isinstance(image, Path) and image.is_symlink():  # nor would `Photos` show it
                    self.skipped["links to files (not followed)"] += 1
                elif images.setdefault(prefix + name, image) is not image:
                    self.skipped["of the same id as another"] += 1
            self.reporter.check()
        return list(images.items())

    def _embed(self, plan: IndexingPlan, seen: dict[str, tuple[str | None] | None]) -> int:
        """How many were added or replaced."""
        total, added = len(plan.to_embed), 0
        self.reporter.tell(state="indexing", done=0, total=total)
        waiting, saved_at = self._empty(), time.monotonic()
        for start in range(0, total, _BATCH):
            part = IndexingPlan(plan.to_embed[start : start + _BATCH], {}, IndexingReport())
            report = self._indexer(waiting).embed(part, batch_size=_BATCH, on_error="skip")
            self._skip(image.kind for image in report.skipped)
            done = min(start + _BATCH, total)
            stopping = self.reporter.stop.is_set()
            late = time.monotonic() - saved_at >= self.job.save_seconds
            if done == total or stopping or late or len(waiting) >= self.job.save_every:
                added += self._save(waiting, seen)
                waiting, saved_at = self._empty(), time.monotonic()
                self.reporter.tell(done=done)
            self.reporter.check()
        return added

    def _skip(self, reasons: Iterable[str]) -> None:
        self.skipped.update(reasons)
        self.reporter.tell(at_once=False, skipped=dict(self.skipped))

    def _empty(self) -> GalleryIndex:
        """For images on their way into the index."""
        index = self.index
        return GalleryIndex(
            model_hash=index.model_hash, target_shape=index.target_shape, image_shape=index.image_shape, storage=index.storage,
            image_storage=index.image_storage, screened=False,
        )  # fmt: skip

    def _save(self, waiting: GalleryIndex, seen: dict[str, tuple[str | None] | None]) -> int:
        """Add what waits to the index as it is now, but for items that somebody changed since they were compared."""
        for attempt in range(_TRIES):
            try:
                with self._locked():
                    return self._save_locked(waiting, seen)
            except IndexConflictError:  # by one that does not know of our lock
                self.index.close()
                self.index = self._loaded()
                if attempt == _TRIES - 1:
                    raise
        raise AssertionError

    def _save_locked(self, waiting: GalleryIndex, seen: dict[str, tuple[str | None] | None]) -> int:
        self.index.refresh()
        now, new = self.index.snapshot(), waiting.snapshot()
        items = [(item, n) for n, item in enumerate(new.items())]
        items = [(item, n) for item, n in items if seen[item.id] == (None if (row := now.row(item.id)) is None else (now.content(row),))]
        removed = self.removed.ids()
        gone = {item.id for item, _ in items if item.id in removed and now.row(item.id) is None}  # since they were compared
        items = [(item, n) for item, n in items if item.id not in gone]
        self._skip([_LEFT_OUT] * len(gone))
        if not items:
            return 0
        ids = [item.id for item, _ in items]
        self.index.add(
            ids,
            np.stack([new.target_tokens(n) for _, n in items]),
            None if new.images is None else np.stack([new.image_tokens(n) for _, n in items]),
            metadata_for(self.index, ids, self.metadata),
            contents=[item.content for item, _ in items],
            replace=True,
        )
        self.index.save(self.path)
        return len(ids)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Waits as long as it takes; once it is to stop, no longer than another save takes."""
        asked: float | None = None
        while True:
            with try_directory_lock(self.path) as held:
                if held:
                    yield
                    return
            if self.reporter.stop.is_set():
                asked = asked or time.monotonic()
                if time.monotonic() - asked > _STOPPED_WITHIN:
                    raise Stopped
            time.sleep(_POLL_SECONDS)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT set the event, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    (told,) = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.nice(_NICE)  # whoever searches comes first
    return 0 if index_folder(FolderJob.told(told)).state == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
