"""One cold start, in a fresh process: `python -m benchmarks.serving.start engine|torch SPAWNED_NS SETTING_JSON`.

Prints one line of JSON: milliseconds since the process was spawned at the end of each phase, and its resident memory then. Nothing is
imported before it is measured but parts of the standard library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from ..resident import status_bytes

Search = Callable[[str | bytes, str], Any]
_QUERIES_SERVED = 200


def main() -> None:
    way, spawned, described = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    phases: dict[str, dict[str, float]] = {}

    def reached(name: str) -> None:
        phases[name] = {"ms": (time.monotonic_ns() - spawned) / 1e6, "resident_bytes": status_bytes("VmRSS")}

    reached("interpreter")
    search = (_engine if way == "engine" else _torch)(described, reached)
    ids, files, texts = described["references"], described["files"], described["texts"]
    search(ids[0], texts[0])
    reached("first answer")
    for at in range(1, _QUERIES_SERVED):
        row = at % len(ids)
        search(ids[row] if at % 2 else _read(files[row]), texts[row])
    reached("served")
    print(json.dumps({"phases": phases, "peak_bytes": status_bytes("VmHWM")}))


def _read(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


def _engine(described: dict[str, Any], reached: Callable[[str], None]) -> Search:
    from dqe_engine import Query, RetrievalEngine

    reached("imported")
    engine = RetrievalEngine.load(described["bundle"], provider="cpu", threads=described["threads"])
    engine.load_index(described["index"])
    reached("ready")

    def search(reference: str | bytes, text: str) -> Any:
        if isinstance(reference, str):
            return engine.search(Query(reference_id=reference, text=text, k=described["k"]))
        return engine.search(Query(image=reference, text=text, k=described["k"]))

    return search


def _torch(described: dict[str, Any], reached: Callable[[str], None]) -> Search:
    import torch  # noqa: F401

    reached("imported")
    from .searchers import TorchFiles, TorchSearcher

    searcher = TorchSearcher(TorchFiles(**described["torch"]))
    reached("ready")
    return lambda reference, text: searcher.search([reference], [text], described["k"])


if __name__ == "__main__":
    main()
