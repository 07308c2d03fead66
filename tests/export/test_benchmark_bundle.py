"""The public datasets' protocols give the same figures and files for a checkpoint and for the bundle exported from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_benchmarks import WRITERS

from dqe_training.cli import evaluate
from dqe_training.data.public.detect import open_benchmark
from dqe_training.evaluation.benchmarks import evaluate_benchmark
from dqe_training.evaluation.rankers import open_ranker


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", list(WRITERS))
def test_checkpoint_and_bundle_agree(name: str, checkpoint_path: Path, bundle_path: Path, tmp_path: Path) -> None:
    benchmark = open_benchmark(WRITERS[name](tmp_path))
    assert benchmark is not None
    shown: dict[str, int] = {"gallery": 0, "queries": 0}

    def advance(what: str, count: int) -> None:
        shown[what] += count

    split = benchmark.splits[0]
    ours, our_sets = evaluate_benchmark(benchmark, open_ranker(checkpoint_path), split=split)
    theirs, their_sets = evaluate_benchmark(benchmark, open_ranker(bundle_path, advance), split=split)
    for mine, other in zip(our_sets, their_sets, strict=True):
        depth = min(mine.ranked.shape[1], len(mine.queries.gallery))
        np.testing.assert_array_equal(mine.ranked[:, :depth], other.ranked[:, :depth])
    assert ours == theirs
    assert shown == {"gallery": sum(len(s.queries.gallery) for s in our_sets), "queries": sum(len(s.queries) for s in our_sets)}


@pytest.mark.usefixtures("one_thread")
def test_a_bundle_writes_the_checkpoints_submission(checkpoint_path: Path, bundle_path: Path, tmp_path: Path) -> None:
    folder = WRITERS["cirr"](tmp_path / "cirr")
    contents = []
    for model in (checkpoint_path, bundle_path):
        out = tmp_path / model.name
        assert evaluate.main([str(model), "--data", str(folder), "--split", "test1", "--submission", str(out)]) == 0
        contents.append([json.loads(path.read_text()) for path in sorted(out.iterdir())])
    assert len(contents[0]) == 2
    assert contents[0] == contents[1]
