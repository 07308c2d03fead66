"""From pixels and a text to the ids of a gallery on one device: through the host between the steps, and with what can stay on the device.

    python -m benchmarks.gpu_chain FOLDER/small --out OUT --work TMP      # FOLDER: from gpu_graphs_prepare; exit code 1 if answers differ

The query is what the query encoder gives, without attributes, whose heads and composition cost the same in every way. Answers are held
against each other before anything is timed. Figures and what was predicted go to OUT/gpu_graphs.json, as graph "chain".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dqe_engine.contracts.graphs import QUERY_ENCODER, VISION_ENCODER
from dqe_engine.device_arrays import CPU_DEVICE, CudaMemory, ForeignArray
from dqe_engine.device_tokens import Tokens
from dqe_engine.encoder import PASSED_ON
from dqe_engine.sessions import OnnxSession
from dqe_engine.zones import cuda, select_zones

from .gpu_graphs import Record, add_latency
from .gpu_graphs_model import Model

ITEMS, K = 1_000_000, 100
KEPT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "through the host": ((), ()),
    "tokens on the device": (("image_tokens",), PASSED_ON),
    "tokens and queries on the device": (("image_tokens",), (*PASSED_ON, "base_query")),
}
"""What stays on the device of the vision encoder's outputs and of the query encoder's."""
Found = tuple[NDArray[Any], NDArray[Any]]


class Chain:
    """Two graphs and a gallery of unit vectors on one device. `size`: of the gallery."""

    def __init__(self, folder: Path, work: Path, device: str, size: int) -> None:
        self._models = [Model(folder, spec, device, work) for spec in (VISION_ENCODER, QUERY_ENCODER)]
        self._sessions = []
        for model in self._models:
            path, provider = model.files[f"{model.spec.name}-f16"], "cuda" if device == "cuda" else "cpu"
            session = OnnxSession(path, model.spec, model.sizes, provider=provider, threads=1)  # type: ignore[arg-type]
            session.device = session.device or (CPU_DEVICE, 0)
            self._sessions.append(session)
        width = self._models[0].sizes.embedding_dim
        made = torch.randn((size, width), generator=torch.Generator().manual_seed(0))
        self._items = torch.nn.functional.normalize(made, dim=1).half().to(device)
        self._index = cuda.Index(self._items) if device == "cuda" else None

    def call(self, batch: int, kept: tuple[tuple[str, ...], tuple[str, ...]]) -> Callable[[], Found]:
        vision, query = self._sessions
        pixels, texts = ({name: t.cpu().numpy() for name, t in model.inputs(batch).items()} for model in self._models)

        def once() -> Found:
            tokens = vision.run_keeping(kept[0], **pixels)["image_tokens"]
            return self._search(query.run_keeping(kept[1], **texts | {"image_tokens": tokens})["base_query"])

        return once

    def _search(self, queries: Tokens) -> Found:
        if self._index is None:
            given = np.from_dlpack(queries) if isinstance(queries, ForeignArray) else queries
            found = select_zones(given, self._items.numpy(), k=K)
            return found.ids, found.scores
        with CudaMemory.open() as memory:
            found = self._index.select(queries if isinstance(queries, ForeignArray) else memory.upload(queries), k=K)
            return memory.download(found.ids), memory.download(found.scores)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_chain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="one model's, from gpu_graphs_prepare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for graphs with their weights; 3 GB at full size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per case (default: 1)")
    parser.add_argument("--items", type=int, default=ITEMS, help=f"of the gallery (default: {ITEMS})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    record = Record(options.out, {"model": options.folder.name, "graph": "chain"})
    chain, differ = Chain(options.folder, options.work, options.device, options.items), 0
    for batch in options.batches:
        calls: dict[str, Any] = {name: chain.call(batch, kept) for name, kept in KEPT.items()}
        expected, *others = (partial(call)() for call in calls.values())
        for name, found in zip(list(calls)[1:], others, strict=True):
            same = all(map(np.array_equal, found, expected))
            differ += not same
            record.add("answers", contender=name, batch=batch, equal=same)
            print(f"  B = {batch:2d} {name}: answers {'equal' if same else 'DIFFER'}", flush=True)
        add_latency(record, batch, calls, options.seconds, lambda: None)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
