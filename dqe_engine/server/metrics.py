"""`Metrics`: what a process counts, and the Prometheus text of all processes of a run.

Every process keeps its numbers in memory, and with `settings.state` also in a file of its own in state/metrics, written when it is asked
for metrics and at most a second after they change. Whoever is asked adds up the files. prometheus_client writes the text; its own
multiprocess mode is not used: an environment variable switches it on for a whole process when the library is imported, two servers in one
process share their numbers, and a worker that gets the process id of a dead one (in containers, often) goes on with its gauges.

A worker lives while it holds the lock of its file. What a dead one counted is kept, added to what other dead ones did; its gauges go away.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from .settings import ServerSettings

if TYPE_CHECKING:
    from prometheus_client.core import Metric

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PUBLISHED_EVERY_S = 1.0
_REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_BATCH = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_MOST_SERIES = 2000
"""Series of one family in a process. Labels are of bounded sets; should one be not, further series are counted together as `other`."""

_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dqe_cache_hits": ("Answers that were remembered, by cache", ("cache",)),
    "dqe_cache_misses": ("Answers that had to be made, by cache", ("cache",)),
    "dqe_rejected": ("Requests that were refused before they were worked on, by reason", ("reason",)),
}
_HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "dqe_request_seconds": ("Time from a request's head to the end of its answer", ("route", "method", "status"), _REQUEST_S),
    "dqe_stage_seconds": ("Time that a stage of a search took", ("stage",), _STAGE_S),
    "dqe_batch_questions": ("Questions that were answered together", (), _BATCH),
}
_GAUGES: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "dqe_queue_depth": ("Questions that wait for a batch, of all workers", sum),
    "dqe_uploads_in_flight": ("Images that are being taken in, of all workers", sum),
    "dqe_index_items": ("Items that searches see; where workers differ for a moment, the most", max),
    "dqe_index_following": ("1 where all workers can read what is saved to the index, else 0", min),
    "dqe_workers_ready": ("Workers that answer", sum),
}
_PER_WORKER = {
    "dqe_process_start_time_seconds": "When a worker started, in seconds since 1970",
    "dqe_process_resident_memory_bytes": "Memory of a worker, shared files included",
}


class _Histogram(msgspec.Struct, array_like=True):
    counts: list[int]  # of each bucket alone, the last one of what is above all bounds
    total: float = 0.0


class _Numbers(msgspec.Struct):
    """What one process counted, or several: by family, then by the values of its labels, joined by line breaks."""

    counters: dict[str, dict[str, float]] = msgspec.field(default_factory=dict)
    histograms: dict[str, dict[str, _Histogram]] = msgspec.field(default_factory=dict)
    gauges: dict[str, float] = msgspec.field(default_factory=dict)
    worker: int = 0  # process id
    index: tuple[int, str] | None = None  # generation, revision
    folded: list[str] = msgspec.field(default_factory=list)  # of the dead: names whose numbers are in, and whose files may be there still

    def add(self, other: _Numbers) -> None:
        """Its counters and histograms, which only grow."""
        for family, series in other.counters.items():
            own = self.counters.setdefault(family, {})
            for labels, value in series.items():
                own[labels] = own.get(labels, 0.0) + value
        for family, histograms in other.histograms.items():
            mine = self.histograms.setdefault(family, {})
            for labels, one in histograms.items():
                if labels not in mine:
                    mine[labels] = _Histogram(list(one.counts), one.total)
                elif len(mine[labels].counts) == len(one.counts):  # else another version's, with other buckets
                    mine[labels] = _Histogram(
                        [a + b for a, b in zip(mine[labels].counts, one.counts, strict=True)], mine[labels].total + one.total
                    )


class Metrics:
    """The numbers of one process. Two in one process have nothing to do with one another. For any thread."""

    def __init__(self, settings: ServerSettings) -> None:
        """With `settings.state`, raises OSError where its folder `metrics` cannot be made or written to."""
        self._lock = threading.Lock()
        self._numbers = _Numbers(worker=os.getpid())
        self._changed = True
        self._uploads = 0
        self._numbers.gauges["dqe_process_start_time_seconds"] = _started()
        self._files = _Files(settings.state / "metrics") if settings.state is not None else None
        self._stop = threading.Event()
        if self._files is not None:
            weakref.finalize(self, _end, self._stop, self._files)
            threading.Thread(target=_publish, args=(weakref.ref(self), self._stop), name="dqe-metrics", daemon=True).start()

    def close(self) -> None:
        """Write the last numbers, and let go of the file. Metrics that are asked for later are those of now."""
        if self._files is not None:
            self._stop.set()
            self._write()
            self._files.close()

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request that was answered. `route`: its template, never a path; `method`: one of HTTP's. `status`: 0 where its client left."""
        self._observe("dqe_request_seconds", f"{route}\n{method}\n{status}", seconds)

    def stages(self, timings_ms: Mapping[str, float]) -> None:
        """Where the time of a search went, as in `SearchResult.timings_ms`."""
        for stage, milliseconds in timings_ms.items():
            self._observe("dqe_stage_seconds", stage, milliseconds / 1000)

    def batch(self, size: int) -> None:
        """Questions that were answered together."""
        self._observe("dqe_batch_questions", "", size)

    def cache(self, name: str, *, hits: int, misses: int) -> None:
        """What a cache of this process has counted since it started."""
        with self._lock:
            self._numbers.counters.setdefault("dqe_cache_hits", {})[name] = float(hits)
            self._numbers.counters.setdefault("dqe_cache_misses", {})[name] = float(misses)
            self._changed = True

    def rejected(self, reason: str) -> None:
        """A request that was refused; `reason`: the code of its problem."""
        with self._lock:
            series = self._numbers.counters.setdefault("dqe_rejected", {})
            labels = _bounded(series, reason)
            series[labels] = series.get(labels, 0.0) + 1
            self._changed = True

    def queue(self, depth: int) -> None:
        """Questions that wait for a batch."""
        self._set("dqe_queue_depth", depth)

    def ready(self, is_ready: bool) -> None:
        """Whether this worker answers."""
        self._set("dqe_workers_ready", float(is_ready))

    def following(self, is_following: bool) -> None:
        """Whether the last look at the index's files went well."""
        self._set("dqe_index_following", float(is_following))

    def index(self, items: int, generation: int, revision: str) -> None:
        """The index that searches see."""
        with self._lock:
            self._numbers.index = (generation, revision)
        self._set("dqe_index_items", items)

    @contextlib.contextmanager
    def upload(self) -> Iterator[None]:
        """An image is being taken in, while the block lasts."""
        self._count_upload(1)
        try:
            yield
        finally:
            self._count_upload(-1)

    def render(self) -> bytes:
        """The Prometheus text of all processes, of `MEDIA_TYPE`. Other processes' numbers are up to a second old."""
        from prometheus_client import CollectorRegistry, generate_latest

        if self._files is None:
            dead, living = _Numbers(), [self._snapshot()]
        else:
            self._write()  # so that no other process, asked next, adds up to less than this one
            dead, others = self._files.read()
            living = [*others, self._snapshot()]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(dead, living))
        return generate_latest(registry)

    def _observe(self, family: str, labels: str, value: float) -> None:
        bounds = _HISTOGRAMS[family][2]
        with self._lock:
            series = self._numbers.histograms.setdefault(family, {})
            one = series.get(labels)
            if one is None:
                labels = _bounded(series, labels)
                one = series.setdefault(labels, _Histogram([0] * (len(bounds) + 1)))
            one.counts[bisect.bisect_left(bounds, value)] += 1
            one.total += value
            self._changed = True

    def _set(self, family: str, value: float) -> None:
        with self._lock:
            self._numbers.gauges[family] = float(value)
            self._changed = True

    def _count_upload(self, change: int) -> None:
        with self._lock:
            self._uploads += change
            self._numbers.gauges["dqe_uploads_in_flight"] = float(self._uploads)
            self._changed = True

    def _snapshot(self) -> _Numbers:
        return msgspec.json.decode(self._encoded(), type=_Numbers)

    def _encoded(self) -> bytes:
        resident = _resident_bytes()
        with self._lock:
            self._numbers.gauges["dqe_process_resident_memory_bytes"] = resident
            self._changed = False
            return msgspec.json.encode(self._numbers)

    def _write(self) -> None:
        if self._files is not None:
            self._files.write(self._encoded())


def _publish(metrics: weakref.ref[Metrics], stop: threading.Event) -> None:
    """A thread of each Metrics with files, until it is closed or forgotten."""
    while not stop.wait(PUBLISHED_EVERY_S):
        one = metrics()
        if one is None:
            return
        if one._changed:
            one._write()
        del one


def _end(stop: threading.Event, files: _Files) -> None:
    stop.set()
    files.close()


class _Files:
    """A folder with a file of numbers and a lock for each process, and one of what the dead ones left."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._told = False
        with self._reading():  # else a reader could take the file for a dead one's before its lock is held
            self._alive: BinaryIO | None = open(folder / f"{self._name}.alive", "wb")  # noqa: SIM115 - until `close`
            fcntl.flock(self._alive, fcntl.LOCK_EX)

    def close(self) -> None:
        with self._lock:
            if self._alive is not None:
                self._alive.close()
                self._alive = None

    def write(self, content: bytes) -> None:
        """The file of this process. A disk that refuses is told once: serving goes on."""
        with self._lock:
            if self._alive is None:
                return
            try:
                _replace(self._folder / f"{self._name}.json", content)
            except OSError as error:
                if not self._told:
                    self._told = True
                    logging.getLogger(__name__).warning("the metrics of this process cannot be written", exc_info=error)

    def read(self) -> tuple[_Numbers, list[_Numbers]]:
        """What the dead counted, and the numbers of each other that lives. One process at a time reads: it also puts the dead aside."""
        try:
            with self._reading():
                return self._read()
        except OSError as error:
            logging.getLogger(__name__).warning("the metrics of other processes cannot be read", exc_info=error)
            return _Numbers(), []

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with open(self._folder / "read.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> tuple[_Numbers, list[_Numbers]]:
        past = self._folder / "dead.json"
        dead = _parsed(past) or _Numbers()
        living, gone = [], []
        for alive in sorted(self._folder.glob("*.alive")):
            name = alive.stem
            if name == self._name:
                continue
            if not _is_held(alive):
                gone.append(name)
            elif (numbers := _parsed(alive.with_suffix(".json"))) is not None:
                living.append(numbers)
        fresh = [name for name in gone if name not in dead.folded]
        for name in fresh:
            numbers = _parsed(self._folder / f"{name}.json")
            if numbers is not None:
                dead.add(numbers)
        if gone or dead.folded:
            dead.folded = gone
            with contextlib.suppress(OSError):
                _replace(past, msgspec.json.encode(dead))  # first, so that a crash in between counts nobody twice
                for name in gone:
                    (self._folder / f"{name}.json").unlink(missing_ok=True)
                    (self._folder / f"{name}.alive").unlink(missing_ok=True)
        return dead, living


def _is_held(file: Path) -> bool:
    """Whether a process that lives has it locked."""
    try:
        with open(file, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _parsed(file: Path) -> _Numbers | None:
    """None for one that is missing, or no numbers: a power loss may leave it empty."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Numbers)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _replace(file: Path, content: bytes) -> None:
    """Whole or not at all for who reads; not flushed, as it is worth nothing after a power loss."""
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)


class _Families:
    """What prometheus_client makes text of."""

    def __init__(self, dead: _Numbers, living: list[_Numbers]) -> None:
        self._living = living
        self._all = dead
        for one in living:
            self._all.add(one)

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

        for name, (says, labels) in _COUNTERS.items():
            counter = CounterMetricFamily(name, says, labels=labels)
            for values, value in sorted(self._all.counters.get(name, {}).items()):
                counter.add_metric(values.split("\n"), value)
            yield counter
        for name, (says, labels, bounds) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, says, labels=labels)
            for values, found in sorted(self._all.histograms.get(name, {}).items()):
                sums = itertools.accumulate(found.counts)
                buckets = list(zip((*map(str, bounds), "+Inf"), sums, strict=True))
                histogram.add_metric(values.split("\n") if labels else [], buckets, found.total)
            yield histogram
        for name, (says, together) in _GAUGES.items():
            given = [one.gauges[name] for one in self._living if name in one.gauges]
            if given:
                yield GaugeMetricFamily(name, says, value=together(given))
        for name, says in _PER_WORKER.items():
            each = GaugeMetricFamily(name, says, labels=("worker",))
            for worker, value in {one.worker: one.gauges[name] for one in self._living if name in one.gauges}.items():
                each.add_metric([str(worker)], value)
            yield each
        yield GaugeMetricFamily("dqe_workers", "Processes that count", value=len(self._living))
        info = InfoMetricFamily("dqe_index", "Generations of the index that workers see", labels=())
        for generation, revision in sorted({one.index for one in self._living if one.index is not None}):
            info.add_metric([], {"generation": str(generation), "revision": revision})
        yield info


def _bounded(series: Mapping[str, object], labels: str) -> str:
    if labels in series or len(series) < _MOST_SERIES:
        return labels
    return "\n".join("other" for _ in labels.split("\n"))


def _started() -> float:
    """When this process did, in seconds since 1970."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text(encoding="ascii").splitlines() if line.startswith("btime "))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return time.time()


def _resident_bytes() -> float:
    try:
        return float(int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError):
        return 0.0
