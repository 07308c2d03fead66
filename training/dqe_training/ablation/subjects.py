"""What an ablation trains and evaluates on: a folder of JSON lines with its labels, or a public dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import InputError

from ..data.public.base import Benchmark
from ..data.public.placing import BenchmarkSource
from ..data.queries import QuerySet
from ..data.records import ImageRecord, read_jsonl
from ..encoding import Listener
from ..evaluation.benchmarks import evaluate_benchmark
from ..evaluation.protocol import Embeddings, EvaluationSet, load_evaluation_set
from ..evaluation.pytorch import embed, encode_gallery_images, evaluate_model
from ..evaluation.split import EvaluationSplit
from ..features import image_token_blocks
from ..features.identity import digest_images
from ..run.trainer import Trainer
from ..run.workflow import DataSource, TrainingSource
from .scores import Scores, benchmark_scores, failure_scores, folder_scores


class Subject(Protocol):
    """Training data, and an evaluation of what was trained on it. `identity` changes when either does."""

    @property
    def source(self) -> TrainingSource: ...
    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    def evaluate(self, trainer: Trainer, features: Path | None, listener: Listener) -> Scores: ...


@dataclass(frozen=True)
class FolderSubject:
    """A folder as `dqe-data garments` writes it, evaluated on its val queries, to choose settings by, or on its test queries, to report."""

    directory: Path
    source: DataSource
    evaluation: EvaluationSet
    gallery: tuple[ImageRecord, ...]
    split: str = "val"

    @classmethod
    def open(cls, directory: Path, split: str = "val") -> FolderSubject:
        """Raises InputError."""
        source, evaluation = DataSource.from_directory(directory), load_evaluation_set(directory, triplets=f"{split}.jsonl")
        named = {record.image: record for record in read_jsonl(directory / "images.jsonl", ImageRecord)}
        return cls(directory, source, evaluation, tuple(named[image] for image in evaluation.gallery), split)

    @property
    def name(self) -> str:
        return f"{self.directory.name}: {len(self.evaluation.records):,} {self.split} queries over {len(self.gallery):,} images"

    @cached_property
    def identity(self) -> str:
        data = self.source.read(self.source.read_vocabulary())
        images = digest_images(self.source.images, (*data.images, *self.evaluation.gallery))
        return _digest(images, data.records, self.evaluation.records, self.gallery, self.source.read_vocabulary())

    def evaluate(self, trainer: Trainer, features: Path | None, listener: Listener) -> Scores:
        tokens = encode_gallery_images(trainer.model, self.source.images, self.evaluation, features=features, listener=listener)
        _, found = evaluate_model(trainer.model, trainer.tokenizer, self.evaluation, tokens)
        return folder_scores(self.evaluation, found.ranked, self.gallery) | failure_scores(self.evaluation, found)


@dataclass(frozen=True)
class BenchmarkSubject:
    """A public dataset, trained on its training split and evaluated on val by its own protocol."""

    benchmark: Benchmark
    source: BenchmarkSource
    images: Path | None
    allow_missing: bool
    split: ClassVar[str] = "val"

    @classmethod
    def open(cls, benchmark: Benchmark, source: TrainingSource, images: Path | None, *, allow_missing: bool) -> BenchmarkSubject:
        """Raises InputError where the dataset has no val split."""
        if cls.split not in benchmark.splits or not isinstance(source, BenchmarkSource):
            raise InputError(
                f"{benchmark.directory}: {benchmark.name} has no {cls.split} split to compare variants on; choose another --split or "
                "dataset"
            )
        return cls(benchmark, source, images, allow_missing)

    @property
    def name(self) -> str:
        return f"{self.benchmark.name} {self.split}, {len(self.source.records):,} training triplets"

    @cached_property
    def identity(self) -> str:
        data = self.source.read(self.source.read_vocabulary())
        judged = EvaluationSplit.of_benchmark(self.benchmark, self.images, allow_missing=self.allow_missing)
        galleries = [digest_images(placed.folder, placed.names) for placed in judged.sets]
        coverage: Sequence[object] = (self.benchmark.name, self.split, self.source.coverage, judged.identity, galleries)
        read = (data.records, data.labels.tolist(), data.named.tolist(), self.source.read_vocabulary())
        return _digest(digest_images(self.source.images, data.images), coverage, *read)

    def evaluate(self, trainer: Trainer, features: Path | None, listener: Listener) -> Scores:
        def rank(queries: QuerySet, folder: Path, names: Sequence[str]) -> Embeddings:
            blocks = image_token_blocks(trainer.model, folder, names, features=features, listener=listener)
            return embed(trainer.model, trainer.tokenizer, queries, blocks)

        _, ranked = evaluate_benchmark(self.benchmark, rank, split=self.split, images=self.images, allow_missing=self.allow_missing)
        return benchmark_scores(self.benchmark.name, ranked)


def _digest(*parts: object) -> str:
    return hashlib.sha256(b"".join(to_json(part) for part in parts)).hexdigest()
