"""Metrics of one process and of several."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dqe_engine.server import counts, metrics
from dqe_engine.server.metrics import Metrics
from dqe_engine.server.settings import ServerSettings

WORKER = """
import os, sys
from pathlib import Path
from dqe_engine.server.metrics import Metrics
from dqe_engine.server.settings import ServerSettings
metrics = Metrics(ServerSettings(Path("b"), Path("i"), state=Path(sys.argv[1])))
metrics.request("/v1/search", "POST", 200, 0.01)
metrics.queue(5)
metrics.index(7, 3, "aa")
metrics.render()
print("ready", flush=True)
sys.stdin.readline()
os._exit(1)  # no goodbye
"""


def made(state: Path | None = None) -> Metrics:
    return Metrics(ServerSettings(Path("b"), Path("i"), state=state))


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            place = (sample.name, tuple(sorted(sample.labels.items())))
            assert place not in found
            found[place] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


def test_everything_that_is_counted_is_shown() -> None:
    metrics = made()
    metrics.request("/v1/items/{id}", "GET", 200, 0.004)
    metrics.request("/v1/items/{id}", "GET", 200, 100.0)
    metrics.stages({"encode": 2.0, "search": 0.05})
    metrics.batch(3)
    metrics.cache("uploads", hits=3, misses=4)
    metrics.cache("uploads", hits=5, misses=4)
    metrics.rejected("rate")
    metrics.queue(9)
    metrics.ready(True)
    metrics.index(5000, 12, "504dd69fbc65b9c6")
    route = {"route": "/v1/items/{id}", "method": "GET", "status": "200"}
    assert value(metrics, "dqe_request_seconds_count", **route) == 2
    assert value(metrics, "dqe_request_seconds_sum", **route) == pytest.approx(100.004)
    assert value(metrics, "dqe_request_seconds_bucket", le="0.0025", **route) == 0
    assert value(metrics, "dqe_request_seconds_bucket", le="0.005", **route) == 1
    assert value(metrics, "dqe_request_seconds_bucket", le="+Inf", **route) == 2
    assert value(metrics, "dqe_stage_seconds_sum", stage="encode") == pytest.approx(0.002)
    assert value(metrics, "dqe_batch_questions_bucket", le="4.0") == 1
    assert value(metrics, "dqe_cache_hits_total", cache="uploads") == 5
    assert value(metrics, "dqe_cache_misses_total", cache="uploads") == 4
    assert value(metrics, "dqe_rejected_total", reason="rate") == 1
    assert value(metrics, "dqe_queue_depth") == 9
    assert value(metrics, "dqe_workers_ready") == 1
    assert value(metrics, "dqe_index_items") == 5000
    assert value(metrics, "dqe_index_info", generation="12", revision="504dd69fbc65b9c6") == 1
    assert value(metrics, "dqe_workers") == 1
    assert len([name for name, _ in samples(metrics) if name.startswith("dqe_process_")]) == 2
    metrics.index(1, 13, "ff")
    assert value(metrics, "dqe_index_info", generation="12", revision="504dd69fbc65b9c6") is None


def test_uploads_in_flight_come_back_down() -> None:
    metrics = made()

    def fails() -> None:
        with metrics.upload(), metrics.upload():
            assert value(metrics, "dqe_uploads_in_flight") == 2
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fails()
    assert value(metrics, "dqe_uploads_in_flight") == 0


def test_two_in_one_process_do_not_collide(tmp_path: Path) -> None:
    for first, second in ((made(), made()), (made(tmp_path / "a"), made(tmp_path / "b"))):
        first.rejected("rate")
        assert value(first, "dqe_rejected_total", reason="rate") == 1
        assert value(second, "dqe_rejected_total", reason="rate") is None
        first.close()
        second.close()


def test_two_of_one_run_in_one_process_add_up(tmp_path: Path) -> None:
    first, second = made(tmp_path), made(tmp_path)
    first.rejected("rate")
    second.rejected("rate")
    first.render()
    assert value(second, "dqe_rejected_total", reason="rate") == 2
    assert value(second, "dqe_workers") == 2
    first.close()
    second.close()


def test_numbers_are_published_without_anybody_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PUBLISHED_EVERY_S", 0.01)
    written = threading.Event()
    replace = counts._replace
    monkeypatch.setattr(counts, "_replace", lambda file, content: (replace(file, content), b"rate" in content and written.set()))
    first, second = made(tmp_path), made(tmp_path)
    first.rejected("rate")
    assert written.wait(60)
    assert value(second, "dqe_rejected_total", reason="rate") == 1
    first.close()
    second.close()


def test_what_the_dead_counted_stays_and_their_gauges_go(tmp_path: Path) -> None:
    metrics = made(tmp_path)
    metrics.request("/v1/search", "POST", 200, 0.01)
    route = {"route": "/v1/search", "method": "POST", "status": "200"}
    for died in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            assert value(metrics, "dqe_request_seconds_count", **route) == died + 2
            assert value(metrics, "dqe_queue_depth") == 5
            assert value(metrics, "dqe_workers") == 2
            worker.stdin.write("\n")
            worker.stdin.flush()
            assert worker.wait(60) == 1
        for _ in range(2):
            assert value(metrics, "dqe_request_seconds_count", **route) == died + 2
            assert value(metrics, "dqe_queue_depth") is None
            assert value(metrics, "dqe_index_info", generation="3", revision="aa") is None
            assert value(metrics, "dqe_workers") == 1
    assert len(list((tmp_path / "metrics").iterdir())) == 4  # this process's two, the reader's lock, and the dead's
    metrics.close()


def test_a_crash_while_the_dead_are_put_aside_counts_nobody_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, metrics = made(tmp_path), made(tmp_path)
    gone.rejected("rate")
    gone.close()

    def fails(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fails)
        assert value(metrics, "dqe_rejected_total", reason="rate") == 1
        assert value(metrics, "dqe_rejected_total", reason="rate") == 1
    for _ in range(3):
        assert value(metrics, "dqe_rejected_total", reason="rate") == 1
    assert json.loads((tmp_path / "metrics" / "dead.json").read_bytes())["folded"] == []
    metrics.close()


def test_a_disk_that_refuses_does_not_stop_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = made(tmp_path)

    def full(file: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(counts, "_replace", full)
    metrics.rejected("rate")
    assert value(metrics, "dqe_rejected_total", reason="rate") == 1
    metrics.close()


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    metrics, other = made(tmp_path), made(tmp_path)
    other.rejected("rate")
    other.render()
    for file in (tmp_path / "metrics").glob("*.json"):
        file.write_bytes(b'{"counters": 3}')
    (tmp_path / "metrics" / "dead.json").write_bytes(b"")
    assert value(metrics, "dqe_rejected_total", reason="rate") is None
    metrics.close()
    other.close()


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_MOST_SERIES", 10)
    metrics = made()
    for number in range(1000):
        metrics.request(f"/{number}", "GET", 200, 0.1)
        metrics.rejected(str(number))
    assert value(metrics, "dqe_request_seconds_count", route="other", method="other", status="other") == 990
    assert value(metrics, "dqe_rejected_total", reason="other") == 990


def test_threads_count_everything() -> None:
    metrics = made()
    threads = [threading.Thread(target=lambda: [metrics.batch(1) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "dqe_batch_questions_count") == 8000


def test_importing_has_no_effects() -> None:
    program = """
import os, sys
before = dict(os.environ)
import dqe_engine.server.metrics
assert dict(os.environ) == before
assert "prometheus_client" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
