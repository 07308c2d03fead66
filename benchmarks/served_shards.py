"""`dqe-serve` over one index and over the same items in shards: a client that asks each server in turn. The package's own sample, repeated.

python -m benchmarks.served_shards                     # one index, and two shards in the server's process
python -m benchmarks.served_shards --ray --items 17000 # and two shards on Ray
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.load.server import Server, serving
from benchmarks.report import table
from dqe_engine import sample
from dqe_engine.engine import RetrievalEngine
from dqe_engine.index.shard_files import cut_index

SHARDS = 2
SPREAD = 0.02
"""Length of the noise on each token of a repeated photo, so that no two items tie."""
COLOURS, PATTERNS = ("red", "teal", "blue", "orange"), ("striped", "dotted", "plain")


def build(folder: Path, items: int) -> None:
    """`index`, and `shards`, the same items cut in two."""
    rng = np.random.default_rng(0)
    with RetrievalEngine.load(sample.bundle(), provider="cpu") as engine:
        engine.index_images(sample.photos())
        index, now = engine.index, engine.index.snapshot()
        rows = now.live_rows().tolist()
        targets, images = (np.stack([read(row) for row in rows]).astype(np.float32) for read in (now.target_tokens, now.image_tokens))
        for start in range(len(rows), items, len(rows)):
            some = min(len(rows), items - start)
            noise = rng.standard_normal(targets[:some].shape, np.float32) * np.float32(SPREAD / targets.shape[2] ** 0.5)
            noisy = targets[:some] + noise
            ids = [f"again/{start + n}" for n in range(some)]
            index.add(ids, noisy / np.linalg.norm(noisy, axis=2, keepdims=True), images[:some])
        index.save(folder / "index")
        cut_index(index, folder / "shards", SHARDS)
    place = {"kind": "index-elsewhere", "schema_version": 1, "shards": {"path": "shards"}}
    (folder / "ray.json").write_text(json.dumps(place))


def questions(count: int, ids: Sequence[str]) -> list[dict[str, Any]]:
    """An item and a text, each pair once, so that no server remembers the answer; every second one explained, as the page asks."""
    texts = [f"is {colour} and {pattern}" for colour in COLOURS for pattern in PATTERNS]
    return [
        {"reference_id": ids[n % len(ids)], "text": texts[n // len(ids) % len(texts)], "k": 24, "zones": n % 2 == 1, "explain": n % 2 == 1}
        for n in range(count)
    ]


def ask(connection: http.client.HTTPConnection, question: dict[str, Any]) -> tuple[float, Any]:
    """Seconds, and the hits' ids. A shard that was late, as on a machine that stood still, is asked again."""
    for _ in range(60):
        begun = time.perf_counter()
        connection.request("POST", "/v1/search", json.dumps(question), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        taken = time.perf_counter() - begun
        if answer.status == 200:
            return taken, [hit["id"] for hit in json.loads(body)["hits"]]
        time.sleep(1)
    raise RuntimeError(f"{answer.status}: {body.decode()[:200]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="served_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=17_000, metavar="N")
    parser.add_argument("--requests", type=int, default=400, metavar="N", help="to each server")
    parser.add_argument("--ray", action="store_true", help="also over shards on Ray, which is started here unless RAY_ADDRESS is set")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made, ExitStack() as opened:
        folder = Path(made)
        build(folder, args.items)
        places = {"one index": "index", f"{SHARDS} shards in the process": "shards"} | (
            {f"{SHARDS} actors": "ray.json"} if args.ray else {}
        )
        before = machine.load_average()[0]
        servers: dict[str, Server] = {
            name: opened.enter_context(serving(sample.bundle(), folder / place, log=folder / "log")) for name, place in places.items()
        }
        connections = {name: http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for name, server in servers.items()}
        ids = sorted(str(path.relative_to(sample.photos())) for path in sample.photos().rglob("*.jpg"))
        asked, taken, different = questions(args.requests + 20, ids), dict[tuple[str, bool], list[float]](), 0
        spent = {name: -server.cpu_s() for name, server in servers.items()}
        for n, question in enumerate(asked):
            answers = []
            for name in np.roll(list(servers), n).tolist():
                seconds, found = ask(connections[name], question)
                answers.append(found)
                if n >= 20:
                    taken.setdefault((name, question["zones"]), []).append(1000 * seconds)
            different += any(found != answers[0] for found in answers)
        rows = []
        for name, server in servers.items():
            cpu = 1000 * (spent[name] + server.cpu_s()) / len(asked)
            cells = [f"{np.percentile(taken[name, zoned], q):.1f}" for zoned in (False, True) for q in (50, 95)]
            rows.append([name, *cells, f"{cpu:.1f}" if "actors" not in name else "–"])
    header = ["", "p50, ms", "p95, ms", "with zones and explained: p50", "p95", "processor ms a query"]
    print(table(header, rows))
    print(f"{args.items:,} items, {args.requests} requests each, one at a time; other answers than the first: {different}; "
          f"load {before:.0f} before, {machine.load_average()[0]:.0f} after")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
