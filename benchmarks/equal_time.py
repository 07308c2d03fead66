"""What DQE-CIR's training costs in steps of the demo's baseline, by which the demo gives both the same time; medians, in turns.

python -m benchmarks.equal_time        # 4 minutes on two idle cores; writes equal-time.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine, report
from dqe_export.demo.pipeline import SHORT, baseline_config
from dqe_training.config import TrainConfig
from dqe_training.data.garments.dataset import GarmentsSpec, write_garments
from dqe_training.data.triplets import TextBatcher, TripletData
from dqe_training.distributed import World
from dqe_training.encoding import TrainingImages
from dqe_training.run.configuration import load_config
from dqe_training.run.optim import build_optimizer
from dqe_training.run.step import Batch, TrainingStep
from dqe_training.run.workflow import DataSource, build_model
from dqe_training.tokenizer import build_tokenizer
from dqe_training.trns.refreshing import Negatives

_ROOT = Path(__file__).parent
TRIPLETS = 3_000
STEPS = 5
"""Steps of each kind in a round."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="equal_time", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--triplets", type=int, default=TRIPLETS, help="drawn for this, half as many images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / machine.slug(), help="folder for results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(machine.cores())
    kinds = _kinds(options.triplets)
    before = machine.load_average()
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(options.rounds + 1):  # the first is warm-up
        for kind, work in kinds.items():
            started = time.perf_counter()
            work()
            if turn:
                taken[kind].append(time.perf_counter() - started)
    seconds = {kind: float(np.median(times)) for kind, times in taken.items()}
    step = seconds["baseline"] / STEPS
    costs = {
        "plain": seconds["plain"] / STEPS / step,
        "with_negative": seconds["with a negative"] / STEPS / step,
        "refresh": seconds["refresh"] / step * 1000 / options.triplets,
    }
    print(report.table(["in steps of the baseline", ""], [[name, f"{cost:.2f}"] for name, cost in costs.items()]))
    path = options.out / "equal-time.json"
    report.save_json(path, {
        "costs": {name: round(cost, 3) for name, cost in costs.items()}, "baseline_step_ms": round(1000 * step, 1),
        "seconds": {kind: [round(one, 4) for one in times] for kind, times in taken.items()},
        "triplets": options.triplets, "steps_a_round": STEPS, "load_before": before, "load_after": machine.load_average(),
        "machine": machine.describe(("torch", "transformers", "numpy")),
    })  # fmt: skip
    print(path)
    return 0


def _kinds(triplets: int) -> dict[str, Callable[[], object]]:
    """What is timed: some steps of either model, and a refresh of DQE-CIR's negatives."""
    ours = load_config(SHORT.config)
    with tempfile.TemporaryDirectory() as folder:
        spec = GarmentsSpec(train_images=triplets // 2, train_triplets=triplets, gallery_images=60, val_queries=24)
        source = DataSource.from_directory(write_garments(Path(folder) / "garments", spec))
        data = source.read(source.read_vocabulary())
        built = {name: _Built(config, source, data) for name, config in (("ours", ours), ("theirs", baseline_config(ours, triplets)))}
    ours_, theirs = built["ours"], built["theirs"]
    return {
        "baseline": theirs.steps(negative=False),
        "plain": ours_.steps(negative=False),
        "with a negative": ours_.steps(negative=True),
        "refresh": ours_.refresh,
    }


class _Built:
    """A model with what its training needs; image tokens are random, which costs the same."""

    def __init__(self, config: TrainConfig, source: DataSource, data: TripletData) -> None:
        tokenizer = build_tokenizer(data.texts)
        model = build_model(config, source.read_vocabulary(), tokenizer.get_vocab_size()).train()
        tokens = torch.randn(len(data.images), model.sizes.image_tokens, model.sizes.vision_width).half()
        texts = TextBatcher(tokenizer, data.training_texts, max_length=config.model.qformer.max_text_length, captions=config.model.captions)
        images = TrainingImages(model, None, tokens, frozen=True, world=World())
        optimizer = build_optimizer(model, config.optim, temperature=config.loss.temperature)
        self._config, self._data, self._rng = config, data, np.random.default_rng(0)
        self._step = TrainingStep(model, optimizer, config, data, texts, images, World())
        self._negatives = Negatives(model, config.trns, data, texts, images, World(), seed=0)

    def steps(self, *, negative: bool) -> Callable[[], None]:
        def run() -> None:
            for _ in range(STEPS):
                rows = self._rng.permutation(len(self._data))[: self._config.optim.batch_size]
                drawn = self._rng.integers(0, len(self._data.images), len(rows)) if negative else None
                self._step.run(Batch(0, rows, rows, self._data.named[rows], drawn), relevance_share=self._config.loss.relevance_share)

        return run

    def refresh(self) -> None:
        self._negatives.refresh(1)


if __name__ == "__main__":
    sys.exit(main())
