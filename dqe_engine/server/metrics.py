"""`Metrics`: what a process counts, and the Prometheus text of all processes of a run.

Every process keeps its numbers in memory, and with `settings.state` also in a file of its own in state/metrics, written when it is asked
for metrics and at most a second after they change. Whoever is asked adds up the files. prometheus_client writes the text; its own
multiprocess mode is not used: an environment variable switches it on for a whole process when the library is imported, two servers in one
process share their numbers, and a worker that gets the process id of a dead one (in containers, often) goes on with its gauges.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .counts import CountFiles, Histogram, Numbers, bounded
from .settings import ServerSettings

if TYPE_CHECKING:
    from prometheus_client.core import Metric

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PUBLISHED_EVERY_S = 1.0
_REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_BATCH = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dqe_cache_hits": ("Answers that were remembered, by cache", ("cache",)),
    "dqe_cache_misses": ("Answers that had to be made, by cache", ("cache",)),
    "dqe_incomplete_answers": ("Answers that lack the items of lost shards, or are not proved to be the best, by reason", ("reason",)),
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
    "dqe_index_parts": ("Parts of the index: shards, a database, or one where it lies in the workers", max),
    "dqe_index_parts_lost": ("Parts that gave no answer when a worker last looked; where workers differ, the most", max),
    "dqe_workers_ready": ("Workers that answer", sum),
}
_PER_WORKER = {
    "dqe_process_start_time_seconds": "When a worker started, in seconds since 1970",
    "dqe_process_resident_memory_bytes": "Memory of a worker, shared files included",
}


class Metrics:
    """The numbers of one process. Two in one process have nothing to do with one another. For any thread."""

    def __init__(self, settings: ServerSettings) -> None:
        """With `settings.state`, raises OSError where its folder `metrics` cannot be made or written to."""
        self._lock = threading.Lock()
        self._numbers = Numbers(worker=os.getpid())
        self._changed = True
        self._uploads = 0
        self._numbers.gauges["dqe_process_start_time_seconds"] = _started()
        self._files = CountFiles(settings.state / "metrics") if settings.state is not None else None
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
        self._count("dqe_rejected", reason)

    def incomplete(self, reason: str) -> None:
        """An answer that may lack items; `reason`: "lost" or "unproved"."""
        self._count("dqe_incomplete_answers", reason)

    def parts(self, parts: int, lost: int) -> None:
        """Of the index, and those of them that give no answer."""
        self._set("dqe_index_parts", parts)
        self._set("dqe_index_parts_lost", lost)

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
            dead, living = Numbers(), [self._snapshot()]
        else:
            self._write()  # so that no other process, asked next, adds up to less than this one
            dead, others = self._files.read()
            living = [*others, self._snapshot()]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(dead, living))
        return generate_latest(registry)

    def _count(self, family: str, labels: str) -> None:
        with self._lock:
            series = self._numbers.counters.setdefault(family, {})
            labels = bounded(series, labels)
            series[labels] = series.get(labels, 0.0) + 1
            self._changed = True

    def _observe(self, family: str, labels: str, value: float) -> None:
        bounds = _HISTOGRAMS[family][2]
        with self._lock:
            series = self._numbers.histograms.setdefault(family, {})
            one = series.get(labels)
            if one is None:
                labels = bounded(series, labels)
                one = series.setdefault(labels, Histogram([0] * (len(bounds) + 1)))
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

    def _snapshot(self) -> Numbers:
        return msgspec.json.decode(self._encoded(), type=Numbers)

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


def _end(stop: threading.Event, files: CountFiles) -> None:
    stop.set()
    files.close()


class _Families:
    """What prometheus_client makes text of."""

    def __init__(self, dead: Numbers, living: list[Numbers]) -> None:
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
