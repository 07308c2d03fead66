"""`dqe-serve` under load: one request at a time, 64 connections, uploads, ten times what it can do, and 100,000 requests.

    python -m benchmarks.serving demo                   # the folder of `make demo`; 12 minutes on two idle cores
    python -m benchmarks.serving demo --seconds 5 --only closed --workers 1

Server and clients share the machine, so each figure says how many cores the client took. Ratios are of one run, whose parts take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import machine, report
from ..sections import recorded
from ..targets import Target, targets_table
from . import clients, requests
from .clients import Load, MissingToolError
from .server import Server, serving

SECTIONS = ("closed", "uploads", "overload", "memory")
_PACKAGES = ("dqe-engine", "onnxruntime", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "msgspec", "tokenizers", "pillow")
_ROOT = Path(__file__).parent.parent
_SEED = 18
_MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of `make demo`")
    parser.add_argument("--index", type=Path, metavar="DIR", help="(default: DEMO/index)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="of 64 connections (default: %(default)g)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="in which the parts of `closed` take turns (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=100_000, metavar="N", help="of section memory (default: %(default)s)")
    parser.add_argument("--workers", type=int, action="append", metavar="N", help="repeatable (default: 1 and 2)")
    parser.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}; repeatable")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of serving.json and serving.md (default: results/<machine>)")
    args = parser.parse_args(arguments)
    out = args.out or _ROOT / "results" / machine.slug()
    try:
        _measure(args, out)
    except MissingToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _measure(args: argparse.Namespace, out: Path) -> None:
    results = report.load(out / "serving.json", "serving")
    with tempfile.TemporaryDirectory(prefix="dqe-load-") as folder:
        bench = _Bench(args, Path(folder))
        for section in args.only or SECTIONS:
            print(f"{section} …", flush=True)
            measured = recorded(getattr(bench, section), _PACKAGES, quick=args.seconds < 10, threads=machine.cores())
            results["sections"][section] = measured
            results["targets"] = [target.record() for target in _targets(results["sections"])]
            report.save_json(out / "serving.json", results)
    text = targets_table(_targets(results["sections"]))
    report.save_text(out / "serving.md", f"# dqe-serve under load\n\n{text}\n")
    print(text)


class _Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.bundle, self.index = args.demo / "bundle", args.index or args.demo / "index"
        self.counts: list[int] = args.workers or [1, 2]
        self.searches, self.script = requests.write(requests.searches(args.demo, 50_000, _SEED), folder, "searches")

    def serving(self, workers: int) -> Any:
        return serving(self.bundle, self.index, "--workers", str(workers), log=self.folder / "server.log")

    def closed(self) -> dict[str, Any]:
        """One connection and 64, in turns."""
        found: dict[str, Any] = {}
        for workers in self.counts:
            with self.serving(workers) as server:
                clients.wrk(server, self.script, connections=64, seconds=3)  # warm
                turns: dict[int, list[Load]] = {1: [], 64: []}
                for _ in range(self.args.rounds):
                    for connections, loads in turns.items():
                        seconds = max(2.0, self.args.seconds / self.args.rounds / (1 if connections == 64 else 4))
                        loads.append(clients.wrk(server, self.script, connections=connections, seconds=seconds))
            found[f"{workers} workers"] = {str(connections): _summed(loads) for connections, loads in turns.items()}
        return {"runs": found}

    def uploads(self) -> dict[str, Any]:
        """Photos by multipart, by 1 and by 16 connections."""
        _, script = requests.write(requests.uploads(self.args.demo, 5_000, _SEED), self.folder, "uploads")
        found: dict[str, Any] = {}
        for workers in self.counts:
            with self.serving(workers) as server:
                loads = {c: clients.wrk(server, script, connections=c, seconds=max(2.0, self.args.seconds / 6)) for c in (1, 16)}
            found[f"{workers} workers"] = {str(connections): _summed([load]) for connections, load in loads.items()}
        return {"runs": found}

    def overload(self) -> dict[str, Any]:
        """Ten times what 64 connections get, in an open loop; and 1,000 connections in a closed one. A probe asks beside both."""
        program, found = clients.build(self.folder), dict[str, Any]()
        for workers in self.counts:
            with self.serving(workers) as server:
                capacity = clients.wrk(server, self.script, connections=64, seconds=max(3.0, self.args.seconds / 6)).rate
                seconds = max(3.0, self.args.seconds / 3)
                found[f"{workers} workers"] = {"capacity": round(capacity, 1)} | {
                    name: self._probed(server, program, rate=rate, connections=connections, seconds=seconds)
                    for name, rate, connections in (("open", 10 * capacity, 900), ("closed", 0.0, 900))
                }
        return {"runs": found}

    def _probed(self, server: Server, program: Path, *, rate: float, connections: int, seconds: float) -> dict[str, Any]:
        probe: list[dict[str, Any]] = []
        beside = threading.Thread(
            target=lambda: probe.append(clients.paced(server, program, self.searches, rate=10, connections=20, seconds=seconds - 1).told)
        )
        beside.start()
        load = clients.paced(server, program, self.searches, rate=rate, connections=connections, seconds=seconds)
        ended = time.perf_counter()
        beside.join()
        while True:  # until a search is answered, and as soon as it would be otherwise
            after = clients.paced(server, program, self.searches, rate=20, connections=5, seconds=0.2).told["statuses"]
            if after.keys() == {"200"}:
                break
        return {"load": load.record(), "probe": probe[0], "recovered_s": round(time.perf_counter() - ended, 3), "after": after}

    def memory(self) -> dict[str, Any]:
        """Private memory of one worker after each tenth of the requests."""
        with self.serving(1) as server:
            sizes, sent = [(0, server.resident_bytes())], 0
            while sent < self.args.requests:
                enough = 0
                while enough < self.args.requests / 10:
                    enough += int(clients.wrk(server, self.script, connections=64, seconds=5).told["requests"])
                sent += enough
                sizes.append((sent, server.resident_bytes()))
                print(f"  {sent} requests: {sizes[-1][1] / _MIB:.1f} MiB", flush=True)
        return {"private_bytes_after_requests": sizes}


def _summed(loads: Sequence[Load]) -> dict[str, Any]:
    """Medians of turns, and each."""
    return {
        "rate": round(statistics.median(load.rate for load in loads), 1),
        "p50_ms": statistics.median(load.told["p50_ms"] for load in loads),
        "p99_ms": statistics.median(load.told["p99_ms"] for load in loads),
        "other_than_2xx": sum(load.told["other_than_2xx"] + load.told["failed_connections"] for load in loads),
        "server_ms_per_request": round(1e3 * sum(load.server_cpu_s for load in loads) / sum(load.told["requests"] for load in loads), 3),
        "client_cores": round(statistics.median(load.client_cores for load in loads), 3),
        "turns": [load.record() for load in loads],
    }


def _targets(sections: dict[str, Any]) -> list[Target]:
    found = []
    for workers, runs in sections.get("closed", {}).get("runs", {}).items():
        one, many = runs["1"], runs["64"]
        tail, gain, bad = many["p99_ms"] / many["p50_ms"], many["rate"] / one["rate"], many["other_than_2xx"]
        cpu = one["server_ms_per_request"] / many["server_ms_per_request"]
        what = f"{workers}, 64 connections"
        found += [
            Target("closed", f"{what}: other answers than 200", "0", str(bad), not bad),
            Target("closed", f"{what}: p99", "≤ 6 × p50", f"{tail:.1f} × {many['p50_ms']:.1f} ms", tail <= 6),
            Target("closed", f"{what}: a second", "≥ 3 × one at a time", f"{gain:.1f} × {one['rate']:.0f}", gain >= 3),
            Target("closed", f"{what}: processor time of a request, one at a time / 64", "", f"{cpu:.1f}", None),
        ]
    for workers, runs in sections.get("overload", {}).get("runs", {}).items():
        for name in ("open", "closed"):
            refused = runs[name]["load"]["statuses"].get("429")
            probed = runs[name]["probe"]["statuses"].get("429")
            if refused:
                slow = refused["p99_ms"]
                found.append(Target("overload", f"{workers}, {name} loop: 429 within", "50 ms (p99)", f"{slow:.0f} ms", slow <= 50))
            if probed:
                what = f"{workers}, {name} loop: slowest of {probed['count']} refusals of another client"
                found.append(Target("overload", what, "", f"{probed['max_ms']:.0f} ms", None))
            recovered = runs[name]["recovered_s"]
            found.append(Target("overload", f"{workers}, {name} loop: answers again within", "1 s", f"{recovered:.1f} s", recovered <= 1))
    if sizes := sections.get("memory", {}).get("private_bytes_after_requests"):
        grown = (sizes[-1][1] - sizes[2][1]) / _MIB if len(sizes) > 3 else 0.0
        found.append(Target("memory", f"{sizes[-1][0]:,} requests: grown after the first fifth", "0", f"{grown:.1f} MiB", grown < 5))
    return found


if __name__ == "__main__":
    sys.exit(main())
