"""Training throughput on one process: a step of the demo's model on cached image tokens, plain and with what makes room for
larger batches. Triplets per second, answers compared first.

    python -m benchmarks.train_throughput --batch 128 --chunk 32
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks import machine, report
from benchmarks.harness import Agreement, Contender, Rounds, interleave
from dqe_training.config import OptimConfig, TrainConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.data.garments.dataset import GarmentsSpec, write_garments
from dqe_training.data.triplets import TextBatcher, TripletData
from dqe_training.distributed import World
from dqe_training.encoding import TrainingImages
from dqe_training.model.adapters import prepare_finetuning
from dqe_training.run.configuration import load_config
from dqe_training.run.optim import build_optimizer
from dqe_training.run.step import Batch, TrainingStep
from dqe_training.run.workflow import DataSource, build_model
from dqe_training.tokenizer import build_tokenizer

_ROOT = Path(__file__).parent
_PACKAGES = ("torch", "transformers", "numpy")
_TOLERANCE = 1e-5  # of the loss and the queries, whose arithmetic the options leave alone
PLAIN = "plain"

Answer = tuple[float, torch.Tensor]


@dataclass(frozen=True)
class StepCase:
    """One step over `batch` triplets with a negative each; tokens of a frozen tower are random, which costs the same."""

    batch: int
    chunk: int

    @property
    def label(self) -> str:
        return f"step of {self.batch}"

    def describe(self) -> dict[str, Any]:
        return {"batch": self.batch, "chunk": self.chunk, "preset": "garments"}

    def small(self) -> StepCase:
        return StepCase(8, 4)

    def inputs(self) -> TripletData:
        with tempfile.TemporaryDirectory() as folder:
            spec = GarmentsSpec(train_images=256, train_triplets=max(256, self.batch), gallery_images=60, val_queries=24)
            source = DataSource.from_directory(write_garments(Path(folder) / "garments", spec))
            return source.read(source.read_vocabulary())

    def contenders(self) -> Sequence[Contender]:
        options: dict[str, dict[str, Any]] = {
            PLAIN: {},
            f"cached_chunk={self.chunk}": {"cached_chunk": self.chunk},
            "checkpoint_activations": {"checkpoint_activations": True},
            "both": {"cached_chunk": self.chunk, "checkpoint_activations": True},
        }
        return [Contender(name, partial(self._prepare, changed=changed)) for name, changed in options.items()]

    def checker(self, inputs: TripletData) -> Callable[[Answer], Agreement]:
        loss, queries = self._prepare(inputs, changed={})()

        def check(answer: Answer) -> Agreement:
            error = max(abs(answer[0] - loss), float((answer[1] - queries).abs().max()))
            return Agreement(error <= _TOLERANCE, error, 1.0, f"loss and queries differ by {error:.1e}, allowed are {_TOLERANCE:.0e}")

        return check

    def _prepare(self, data: TripletData, *, changed: dict[str, Any]) -> Callable[[], Answer]:
        """A call that makes one step more; the first is from the same weights in every contender."""
        config = _with(load_config("garments"), changed)
        tokenizer = build_tokenizer(data.texts)
        model = build_model(config, vocabulary(), tokenizer.get_vocab_size())
        prepare_finetuning(model, config)
        model.train().checkpoint_activations = config.optim.checkpoint_activations
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(len(data.images), model.sizes.image_tokens, model.sizes.vision_width, generator=generator).half()
        texts = TextBatcher(tokenizer, data.training_texts, max_length=config.model.qformer.max_text_length, captions=config.model.captions)
        images = TrainingImages(model, None, tokens, frozen=True, world=World())
        optimizer = build_optimizer(model, config.optim, temperature=config.loss.temperature)
        step = TrainingStep(model, optimizer, config, data, texts, images, World())
        rng = np.random.default_rng(0)
        rows = rng.permutation(len(data))[: self.batch]
        batch = Batch(0, rows, rows, data.named[rows], rng.integers(0, len(data.images), self.batch))

        def run() -> Answer:
            queries, parts = step.run(batch, relevance_share=config.loss.relevance_share)
            return parts["total"], queries

        return run


def _with(config: TrainConfig, changed: dict[str, Any]) -> TrainConfig:
    optim: OptimConfig = msgspec.structs.replace(config.optim, **changed)
    return msgspec.structs.replace(config, optim=optim)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train_throughput", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of PyTorch (default: all cores, %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each contender, at most (default: 30)")
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / machine.slug(), help="folder for results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    case = StepCase(options.batch, options.chunk)
    before, started = machine.load_average(), datetime.now(UTC)
    results = interleave(case, Rounds(minimum=min(5, options.rounds), maximum=options.rounds, seconds=20.0))
    path = options.out / "train.json"
    record = report.load(path, "train")
    record["sections"][f"batch {options.batch}"] = {
        "started": started.isoformat(timespec="seconds"), "threads": options.threads, "load_before": before,
        "load_after": machine.load_average(), "machine": machine.describe(_PACKAGES),
        "case": case.describe(), "contenders": [result.record() for result in results],
    }  # fmt: skip
    report.save_json(path, record)
    rows = []
    for result in results:
        if (timing := result.best) is not None:
            p95 = timing.record()["p95_s"]
            rows.append(
                [result.name, f"{options.batch / timing.median:,.0f}", report.milliseconds(timing.median), report.milliseconds(p95)]
            )
    print(report.table(["step", "triplets/s", "median ms", "p95 ms"], rows))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
