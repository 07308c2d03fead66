"""The demo: draw the dataset, train, train the baseline as long, export, index, search, evaluate. One folder, resumable."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from dqe_engine.contracts.parsing import to_json
from dqe_engine.engine import RetrievalEngine
from dqe_engine.files import atomic_write
from dqe_training.ablation.variants import apply_variant, parse_variant
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.config import TrainConfig
from dqe_training.data.garments.dataset import GarmentsSpec, write_garments
from dqe_training.data.images import load_pixels
from dqe_training.data.records import ImageRecord, read_jsonl
from dqe_training.encoding import Listener, TokenTable, encode_image_tokens
from dqe_training.evaluation.protocol import Embeddings, EvaluationSet, Report, load_evaluation_set
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.runtime import evaluate_engine, index_gallery
from dqe_training.pretrain import PretrainConfig, pretrain_from_dataset
from dqe_training.run.configuration import load_config
from dqe_training.run.trainer import finish_run
from dqe_training.run.workflow import DataSource, build_model, train_run

from ..bundle import ExportOptions, export_bundle
from .equal_time import baseline_steps
from .shop import shop_metadata

Announce = Callable[[str], None]


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`config` is a training preset; `dataset` the garments to draw. `from_scratch` trains the vision tower too."""

    config: str = "garments"
    dataset: GarmentsSpec = GarmentsSpec()
    pretraining_dataset: GarmentsSpec = GarmentsSpec(train_images=60_000, train_triplets=0, gallery_images=2_000, val_queries=0, seed=1000)
    pretraining: PretrainConfig = PretrainConfig(epochs=4)
    from_scratch: bool = False
    seeds: int = 1
    overrides: tuple[str, ...] = ()


SHORT = DemoOptions(dataset=GarmentsSpec(train_triplets=24_000))
LONG = DemoOptions(config="garments-long", dataset=GarmentsSpec(train_triplets=48_000))


@dataclass
class TrainedModel:
    """One objective's runs: a checkpoint per seed, with its evaluation in PyTorch. `mining`: seconds of `seconds`, of the runs that were
    trained in this process."""

    name: str
    checkpoints: list[Path] = field(default_factory=list)
    evaluations: list[tuple[Report, Embeddings]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    mining: list[float] = field(default_factory=list)

    def timed(self, events: Listener) -> Listener:
        """`events`, which notes what mining takes."""

        def listener(event: dict[str, Any]) -> None:
            if event.get("event") == "refresh":
                self.mining.append(event["seconds"])
            events(event)

        return listener


@dataclass
class DemoRun:
    """Everything the report shows. `engine` has the gallery indexed; `runtime` is its evaluation; `commit` is of the code when it began."""

    directory: Path
    options: DemoOptions
    evaluation: EvaluationSet
    dqe: TrainedModel
    baseline: TrainedModel
    engine: RetrievalEngine
    runtime: tuple[Report, Embeddings]
    seconds: dict[str, float]
    parameters: int
    commit: str


BASELINE_RATE = 4e-3
"""The baseline's own best learning rate, of the four that the demo's model could choose from, too (docs/method.md, "The demo's rates")."""


def baseline_config(config: TrainConfig, triplets: int) -> TrainConfig:
    """Plain InfoNCE on the same data for the same time, with one nameless attention pool in the place of the attributes': what a pool
    gains by itself is not the method's."""
    optim = msgspec.structs.replace(config.optim, learning_rate=BASELINE_RATE)
    if not optim.seconds:
        optim = msgspec.structs.replace(optim, steps=baseline_steps(config, triplets))
    return msgspec.structs.replace(apply_variant(config, parse_variant("+pool"), name="baseline"), optim=optim)


def run_demo(directory: Path, options: DemoOptions, *, listener: Callable[[str], Listener], announce: Announce) -> DemoRun:
    """Run all stages in `directory`; what a killed run finished is kept. `listener(label)` makes a progress listener."""
    commit = _commit()
    clock = directory / "seconds.json"  # per stage, over all the runs that it took
    seconds: dict[str, float] = msgspec.json.decode(clock.read_bytes(), type=dict[str, float]) if clock.is_file() else {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        announce(name)
        started = time.perf_counter()
        yield
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 2)
        with atomic_write(clock) as stream:
            stream.write(to_json(seconds))

    dataset = directory / "garments"
    with stage("drawing the dataset"), listener_scope(listener("drawing garments")) as events:
        total = options.dataset.train_images + options.dataset.gallery_images
        write_garments(dataset, options.dataset, advance=_counter(events, total))
    config = load_config(options.config, options.overrides)
    if options.from_scratch:
        with stage("pretraining the vision tower"), listener_scope(listener("pretraining")) as events:
            weights = directory / "vision"
            if not weights.exists():
                write_garments(directory / "garments-pretrain", options.pretraining_dataset)
                pretrain_from_dataset(directory / "garments-pretrain", weights, config.model, options.pretraining, listener=events)
            config = msgspec.structs.replace(config, vision_weights=str(weights))
    source = DataSource.from_directory(dataset)
    evaluation = load_evaluation_set(dataset, triplets="test.jsonl")  # rates were chosen on the val queries
    with stage("encoding the images"), listener_scope(listener("encoding")) as events:
        tokens, gallery, pixels = _encode(config, source, evaluation, dataset / "images", events)
    dqe, baseline = TrainedModel("DQE-CIR"), TrainedModel("InfoNCE baseline with a pool")
    for seed in range(options.seeds):
        seeded = msgspec.structs.replace(config, optim=msgspec.structs.replace(config.optim, seed=seed))
        for model, label in ((dqe, "training DQE-CIR"), (baseline, "training the baseline")):
            name = "dqe" if model is dqe else "baseline"
            suffix = f", seed {seed}" if options.seeds > 1 else ""
            with stage(label + suffix), listener_scope(listener(label + suffix)) as events:
                wanted = seeded if model is dqe else baseline_config(seeded, options.dataset.train_triplets)
                run = directory / "runs" / f"{name}-{seed}"
                trainer = train_run(wanted, source, run, listener=model.timed(events), pixels=pixels, image_tokens=tokens)
                finish_run(run, run / "model", replace=True)
                model.checkpoints.append(run / "model")
                model.seconds.append(trainer.progress.seconds)
                model.steps.append(trainer.progress.step)
    bundle = directory / "bundle"
    with stage("exporting to ONNX"):
        checkpoint = load_checkpoint(dqe.checkpoints[0])
        export_bundle(checkpoint, bundle, ExportOptions(name="garments"), force=True)
    with stage("indexing the gallery in the runtime"), listener_scope(listener("indexing")) as events:
        engine = RetrievalEngine.load(bundle, kept_bytes=0)  # latencies are of queries that nobody asked before
        records = read_jsonl(dataset / "images.jsonl", ImageRecord)
        index_gallery(
            engine,
            dataset / "images",
            evaluation,
            metadata=shop_metadata(record for record in records if record.image.startswith("gallery/")),
            progress=lambda done, total: events({"event": "encode", "done": done, "total": total}),
        )
        engine.save_index(directory / "index", overwrite=True)
    with stage("evaluating"):
        runtime = evaluate_engine(engine, evaluation)
        for model in (dqe, baseline):
            for path in model.checkpoints:
                loaded = load_checkpoint(path)
                model.evaluations.append(evaluate_model(loaded.model, loaded.tokenizer, evaluation, gallery))
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    return DemoRun(directory, options, evaluation, dqe, baseline, engine, runtime, seconds, parameters, commit)


def _encode(
    config: TrainConfig, source: DataSource, evaluation: EvaluationSet, images: Path, events: Listener
) -> tuple[Tensor, TokenTable, np.ndarray]:
    """Training image tokens (f16), gallery image tokens (f32) and training pixels: the vision tower is frozen, so all
    runs share them."""
    vocabulary = source.read_vocabulary()
    names = source.read(vocabulary).images
    pixels = load_pixels(images, names, config.model.preprocessing, advance=_counter(events, len(names)))
    model = build_model(config, vocabulary, vocab_size=8).eval()
    with torch.inference_mode():
        tokens = encode_image_tokens(model, pixels, listener=events)
        gallery = encode_gallery_images(model, images, evaluation)
    return tokens, gallery, pixels


@contextmanager
def listener_scope(listener: Listener) -> Iterator[Listener]:
    """Enter the listener where it is a context manager (a progress bar), else just pass it on."""
    with listener if isinstance(listener, AbstractContextManager) else nullcontext():
        yield listener


def _counter(events: Listener, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        events({"event": "load", "done": done, "total": total})

    return advance


def _commit() -> str:
    """What git says of this package's files: "aee889a of 2026-11-27", "… with changes"; empty where they are not in a checkout."""
    here = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for arguments in (("log", "-1", "--format=%h of %cs"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + (" with changes" if changed else "")
