"""Images and queries encoded to a file, without PyTorch, which an emulated processor would take minutes to import.

python -m benchmarks.encoded bundle queries.json out.npz     # queries: [[image file, text], ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query


def main() -> int:
    bundle, queries, out = map(Path, sys.argv[1:])
    engine = RetrievalEngine.load(bundle, provider="cpu", threads=1, verify=False)
    references, texts = zip(*json.loads(queries.read_text()), strict=True)
    paths = [Path(reference) for reference in references]
    images = engine.encode_images(paths)
    encoded = engine.encode_queries([Query(image=path, text=text) for path, text in zip(paths, texts, strict=True)])
    np.savez(
        out,
        image_tokens=images.image_tokens,
        target_tokens=images.target_tokens,
        queries=encoded.queries,
        attribute_weights=encoded.weights,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
