"""A real `dqe-serve` with workers, in a process of its own; an oracle of its answers; and clients that hold every answer against it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query
from dqe_engine.server.photos import content_of

from .hostile_images import encoded
from .samples import noise_image
from .server import READ_KEY, WRITE_KEY, bearer

PATIENCE = 120.0
"""Seconds to wait for what has to come at some time: machines are busy."""
TEXT = "the same but red"


def until(holds: Callable[[], object], what: str, *, seconds: float = PATIENCE, pause: float = 0.02) -> float:
    """Waits until `holds()`; how many seconds that took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds, f"not within {seconds:g} seconds: {what}"
        time.sleep(pause)
    return time.monotonic() - begun


def picture(n: int) -> bytes:
    """The image file of item `n`."""
    return encoded(noise_image(n), "PNG")


def name(n: int) -> str:
    return f"item/{n:04}"


class Oracle:
    """Scores of items 0 to `count` - 1 to one query, by an engine of its own."""

    def __init__(self, bundle: Path, count: int) -> None:
        with RetrievalEngine.load(bundle, provider="cpu", threads=1) as engine:
            encoded_images = engine.encode_images([picture(n) for n in range(count)])
            engine.index.add([name(n) for n in range(count)], encoded_images.target_tokens, encoded_images.image_tokens)
            hits = engine.search(Query(text=TEXT, k=count)).hits
        self.scores = {hit.id: hit.score for hit in hits}

    def check(self, hits: Sequence[dict[str, Any]]) -> set[int]:
        """Numbers of the items found, which are whole, scored as they should be, and in order."""
        scores = [hit["score"] for hit in hits]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [self.scores[hit["id"]] for hit in hits], rtol=0, atol=1e-5)
        assert all(hit["metadata"]["n"] == int(hit["id"][-4:]) for hit in hits)
        assert len({hit["id"] for hit in hits}) == len(hits)
        return {hit["metadata"]["n"] for hit in hits}


class Server:
    """`dqe-serve BUNDLE FOLDER/index --workers 2 --keys …`, whose stderr is FOLDER/log. A context manager that ends it."""

    def __init__(
        self, bundle: Path, folder: Path, *options: str, workers: int = 2, port: int = 0, environment: dict[str, str] | None = None
    ):
        self.folder, self.workers = folder, workers
        keys = folder / "keys"
        keys.touch(0o600)
        keys.write_text(f"read {READ_KEY} reader\nwrite {WRITE_KEY} writer\n")
        program = Path(sys.executable).with_name("dqe-serve")
        command = [str(program), str(bundle), str(folder / "index"), "--keys", str(keys), "--workers", str(workers), "--port", str(port)]
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", "--provider", "cpu", *options], stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | (environment or {}),
            )  # fmt: skip
        assert self.process.stdout is not None
        found = re.search(r"http://[^/]*:(\d+)/", self.process.stdout.readline())
        assert found is not None, self.log()
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            finally:
                self.process.kill()

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def pids(self) -> list[int]:
        """Of the workers."""
        if self.workers == 1:
            return [self.process.pid]
        return [pid for pid in children(self.process.pid) if "spawn_main" in command_of(pid)]

    def resident_kib(self) -> int:
        """Of the workers together, without files that they map."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids()]
        return sum(int(found[1]) for text in texts if (found := re.search(r"^RssAnon:\s+(\d+)", text, re.MULTILINE)))

    def ready(self) -> dict[str, Any] | None:
        try:
            answer = self.send("GET", "/readyz")
        except httpx.HTTPError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def wait_until_ready(self) -> float:
        """Until each worker has answered; how many seconds that took."""
        return until(lambda: self.ready() and self.all_answer(), "ready")

    def all_answer(self) -> bool:
        try:
            text = self.send("GET", "/metrics").text
        except httpx.HTTPError:
            return False
        found = re.search(r"^dqe_workers_ready ([\d.]+)", text, re.MULTILINE)
        return found is not None and float(found[1]) == self.workers

    def put(self, n: int, *, replace: bool = False) -> httpx.Response:
        item = json.dumps({"id": name(n), "metadata": {"n": n}, "replace": replace})
        return self.send(
            "POST", "/v1/items", key=WRITE_KEY,
            files={"image": ("image", picture(n), "image/png"), "item": (None, item, "application/json")},
        )  # fmt: skip

    def search(self, **options: Any) -> httpx.Response:
        query = {"text": TEXT, "k": 10_000, **options}
        return self.send("POST", "/v1/search", json=query)

    def picture(self, n: int) -> httpx.Response:
        return self.send("GET", f"/v1/items/{quote(name(n), safe='')}/image")

    def send(self, method: str, path: str, *, key: str = READ_KEY, **options: Any) -> httpx.Response:
        """Over a connection of its own, so that none that the server may close at any time is used again."""
        with httpx.Client(verify=False, trust_env=False, timeout=PATIENCE) as client:
            return client.request(method, self.url + path, headers=bearer(key), **options)


class Clients:
    """Threads that search and one that adds items 0, 1, 2, … while the block runs; what they saw is checked as it comes.

    One writer adds in order, so what a committed generation holds is a prefix: `check` of a search is that its hits are the items below
    some number, none of them half there. `confirmed`: how many items were confirmed; one more may be there.

    `breaks`: exceptions that are no fault of the server's here. `refusals`: statuses that are proper. `generations`: sizes that the
    index may have, where nobody writes.
    """

    def __init__(
        self,
        server: Server,
        oracle: Oracle,
        *,
        first: int = 0,
        searchers: int = 3,
        breaks: tuple[type[Exception], ...] = (),
        refusals: Sequence[int] = (429, 503),
        generations: Sequence[int] = (),
    ) -> None:
        self.server, self.oracle, self.breaks, self.refusals, self.generations = server, oracle, breaks, refusals, generations
        self.confirmed = first
        self.counts: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work,))
            for work in (*[self._search] * searchers, *[self._write] * (not self.generations))
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if exception[0] is None and self.errors:
            raise self.errors[0]

    def progress(self, searches: int = 5, writes: int = 2) -> None:
        """Waits until so many more were answered."""
        found, written = self.counts["found"] + searches, min(self.confirmed + writes, len(self.oracle.scores))
        until(lambda: self.errors or (self.counts["found"] >= found and self.confirmed >= written), "clients are answered")
        if self.errors:
            raise self.errors[0]

    def _run(self, work: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                try:
                    work()
                except self.breaks as error:
                    self.counts[type(error).__name__] += 1
                    time.sleep(0.05)
        except BaseException as error:
            self.errors.append(error)

    def _search(self) -> None:
        answer = self.server.search()
        if self._refused(answer):
            return
        assert answer.status_code == 200, answer.text
        found = self.oracle.check(answer.json()["hits"])
        assert found == set(range(len(found))), "no prefix: of no generation"
        assert len(found) in self.generations if self.generations else len(found) <= self.confirmed + 1
        self.counts["found"] += 1

    def _write(self) -> None:
        if self.confirmed >= len(self.oracle.scores):
            time.sleep(0.05)
            return
        answer = self.server.put(self.confirmed)
        if self._refused(answer):
            return
        # It may be there already, where a connection broke before the answer.
        assert answer.status_code == 201 or (answer.status_code == 409 and self.breaks), answer.text
        self.confirmed += 1

    def _refused(self, answer: httpx.Response) -> bool:
        if answer.status_code not in self.refusals:
            return False
        assert answer.json()["error"]["request_id"]
        assert answer.status_code == 507 or answer.headers["retry-after"]
        self.counts[str(answer.status_code)] += 1
        time.sleep(0.02)
        return True


def check_whole(server: Server, oracle: Oracle, clients: Clients) -> None:
    """Every confirmed item is there with its picture, and at most the one that was being written besides."""

    def found_now() -> set[int]:
        answer = server.search()
        assert answer.status_code == 200, answer.text
        return oracle.check(answer.json()["hits"])

    # A worker follows the others' saves a moment later, and any of them may be asked.
    until(lambda: all(len(found_now()) >= clients.confirmed for _ in range(6)), "all that was confirmed")
    found = found_now()
    assert found <= set(range(clients.confirmed + 1))
    for n in random.Random(len(found)).sample(sorted(found), min(5, len(found))):
        assert server.picture(n).status_code == 200
    uploads = {path.parent.name + path.name for path in (server.folder / "index.uploads").glob("??/*") if not path.name.startswith(".")}
    assert {content_of(picture(n)) for n in found} <= uploads


def check_log(server: Server) -> None:
    """Nothing was our bug."""
    bad = [line for line in server.log().splitlines() if '"status":500' in line or "ASGI" in line or "Traceback" in line]
    assert not bad, bad[:3]


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return [child for child in found if not is_zombie(child)]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
