"""SIGKILLs of a server's workers while clients search and write; every answer is held against an oracle, and each recovery is timed.

From tests/, `python -m support.chaos_drill --kills 30 --seed 1` runs it by hand, with a tiny bundle, in some minutes; the suite has a
short one. Every second kill hits a worker while it holds the index's lock, that is, in the middle of a write. Times depend on the machine,
so they are told and not judged.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from dqe_engine.bundle import Bundle
from dqe_engine.index import GalleryIndex
from dqe_engine.server.writes import make_index

from .chaos import Clients, Oracle, Server, check_log, check_whole, until
from .tiny_bundle import build_tiny_bundle

KILLED = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError)
"""What a client may see of a process that is killed."""
READY_S = 5.0


@dataclass(frozen=True)
class Kill:
    """`writing`: whether the worker held the index's lock. Seconds from the kill: `answers`, until the server says that it is ready;
    `whole`, until all its workers are."""

    writing: bool
    answers: float
    whole: float


def writer(server: Server) -> int | None:
    """The worker that holds the lock of the index, by the kernel's list of locks."""
    inode, pids = os.stat(server.folder / "index").st_ino, server.pids()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()  # 1: FLOCK ADVISORY WRITE 4711 fe:00:3440824 0 EOF; with "->" after the number, one that waits
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode) and int(fields[4]) in pids:
            return int(fields[4])
    return None


def kill(server: Server, rng: random.Random, *, writing: bool) -> Kill:
    """SIGKILL of a worker, and wait until another has taken its place and is ready."""
    victim = rng.choice(server.pids())
    if writing:
        found: list[int] = []

        def caught() -> bool:
            pid = writer(server)
            if pid is not None:
                found.append(pid)
            return pid is not None

        until(caught, "a worker writes", pause=0.0)
        victim = found[0]
    begun = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    until(server.ready, "an answer")
    answers = time.monotonic() - begun
    until(lambda: victim not in server.pids() and len(server.pids()) == server.workers, "another worker")
    server.wait_until_ready()
    return Kill(writing, answers, time.monotonic() - begun)


def drill(bundle: Path, folder: Path, oracle: Oracle, kills: int, seed: int, told: Callable[[str], None] = lambda line: None) -> list[Kill]:
    """Raises AssertionError for a wrong answer, a confirmed write that is lost, a 500, or an index that is damaged afterwards."""
    rng, done = random.Random(seed), list[Kill]()
    make_index(Bundle.load(bundle), folder / "index")
    with Server(bundle, folder) as server:
        with Clients(server, oracle, breaks=KILLED) as clients:
            for n in range(kills):
                clients.progress(2, 1)
                time.sleep(rng.random() / 5)
                done.append(kill(server, rng, writing=n % 2 == 1))
                told(
                    f"kill {n + 1}, {'of the writer' if done[-1].writing else 'of any'}: answers after {done[-1].answers:.2f} s, "
                    f"all workers after {done[-1].whole:.2f} s; {clients.confirmed} writes confirmed, {dict(clients.counts)}"
                )
            clients.progress()
        check_whole(server, oracle, clients)
        check_log(server)
    GalleryIndex.load(folder / "index", verify=True).close()
    with Server(bundle, folder) as server:
        check_whole(server, oracle, clients)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m support.chaos_drill", description=__doc__)
    for option, default in (("--kills", 30), ("--seed", 1), ("--items", 1000)):
        parser.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = build_tiny_bundle(folder / "bundle")
        done = drill(bundle, folder, Oracle(bundle, args.items), args.kills, args.seed, lambda line: print(line, flush=True))
    for what, times in (("answers", [kill.answers for kill in done]), ("all workers", [kill.whole for kill in done])):
        late = sum(seconds > READY_S for seconds in times)
        print(f"{what}: median {statistics.median(times):.2f} s, longest {max(times):.2f} s, {late} of {len(times)} over {READY_S:g} s")
    print(f"{len(done)} kills, {sum(kill.writing for kill in done)} of them of the writer: no wrong answer, no confirmed write lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
