"""Who gets the share that the KL loss spreads (docs/method.md, equation 7): valid answers, or targets that merely look alike?

    python -m benchmarks.relevance --data runs/method/garments --out relevance.json

Batches of training triplets, drawn without repeats as an epoch draws them, with the target tokens of the sample's model, which is the
demo's. For each batch size and temperature, means over the rows: how often the batch holds another valid answer at all, how much of the
shared mass lies on valid answers and how much would if it were spread evenly, its distance from even (total variation), and among how
many targets it is shared (the exponential of its entropy).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .machine import describe

BATCHES, TEMPERATURES = (64, 128), (0.05, 0.2)


def figures(shared: NDArray[np.float64], valid: NDArray[np.bool_], others: NDArray[np.bool_]) -> dict[str, float]:
    """`shared` (B, B): each row's shared mass, which sums to 1 over `others`, the entries that may share; `valid` (B, B): right answers."""
    valid = valid & others
    even = others / others.sum(axis=1, keepdims=True)
    entropy = -np.sum(shared * np.log(np.where(shared > 0, shared, 1.0)), axis=1)
    return {
        "rows_with_another_answer": float(valid.any(axis=1).mean()),
        "mass_on_answers": float((shared * valid).sum(axis=1).mean()),
        "mass_on_answers_if_even": float((even * valid).sum(axis=1).mean()),
        "distance_from_even": float(0.5 * np.abs(shared - even).sum(axis=1).mean()),
        "targets_that_share": float(np.exp(entropy).mean()),
    }


def target_means(bundle: Path, folder: Path, names: list[str]) -> NDArray[np.float64]:
    """Unit means of the images' target tokens, (N, D)."""
    from dqe_engine import RetrievalEngine

    engine = RetrievalEngine.load(bundle, provider="cpu")
    engine.index_images({name: folder / name for name in names})
    means: NDArray[np.float64] = np.stack([engine.index.target_tokens(name).astype(np.float64).mean(axis=0) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return means


def measure(data: Path, bundle: Path, triplets: int) -> dict[str, Any]:
    import torch

    from dqe_training.data.answers import Answers
    from dqe_training.losses.kl_relevance import relevance_distribution, same_target
    from dqe_training.run.workflow import DataSource

    source = DataSource.from_directory(data)
    vocabulary = source.read_vocabulary()
    read = source.read(vocabulary)
    answers = Answers.of(read, vocabulary)
    assert answers is not None, "garments says what every triplet allows"
    order = np.random.default_rng(0).permutation(len(read))[:triplets]
    images = np.unique(read.target[order])
    means = target_means(bundle, source.images, [read.images[i] for i in images])
    cells = []
    for batch in BATCHES:
        for temperature in TEMPERATURES:
            found = []
            for at in range(0, len(order) - batch + 1, batch):
                rows = order[at : at + batch]
                targets = read.target[rows]
                t = torch.from_numpy(means[np.searchsorted(images, targets)])
                ignore = same_target(torch.from_numpy(targets))
                others = ~(ignore.numpy() | np.eye(batch, dtype=bool))
                shared = relevance_distribution(t @ t.T, share=0.25, temperature=temperature, ignore=ignore).numpy() * others / 0.25
                found.append(figures(shared, answers.among(rows, targets), others))
            means_of = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
            cells.append({"batch": batch, "temperature": temperature, "batches": len(found), **means_of})
    return {"triplets": len(order), "images": len(images), "cells": cells}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of dqe-data garments, such as benchmarks.method makes")
    parser.add_argument("--bundle", type=Path, help="whose target tokens (default: the sample's)")
    parser.add_argument("--triplets", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args()
    from dqe_engine import sample

    found = measure(options.data, options.bundle or sample.bundle(), options.triplets)
    options.out.write_text(json.dumps({"machine": describe(("torch", "numpy", "onnxruntime")), **found}, indent=1) + "\n")
    print("| batch | temperature | rows with another answer | shared mass on answers | if even | distance from even | targets that share |")
    print("|---|---|---|---|---|---|---|")
    for cell in found["cells"]:
        shares = [f"{100 * cell[name]:.2f} %" for name in ("rows_with_another_answer", "mass_on_answers", "mass_on_answers_if_even")]
        print(
            f"| {cell['batch']} | {cell['temperature']} | {' | '.join(shares)} | {cell['distance_from_even']:.2f} | "
            f"{cell['targets_that_share']:.0f} of {cell['batch'] - 1} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
