"""A split to judge a model by, of any dataset: its queries, its galleries' image files, and its figures. Validation and test share it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dqe_engine.contracts.parsing import to_json

from ..checkpointing.checkpoint import load_checkpoint
from ..data.damage import require_readable
from ..data.images import require_images
from ..data.public.base import Benchmark, Options
from ..data.public.placing import open_images, place_queries
from ..data.queries import QuerySet
from ..encoding import evaluating
from ..features import image_token_blocks
from ..model import DQEModel
from .benchmarks import figures as benchmark_figures
from .benchmarks import summary
from .metrics import recalls
from .own_data import load_own_data
from .protocol import Embeddings, EvaluationSet, load_evaluation_set, summarise
from .pytorch import embed

Figures = dict[str, float]
DEPTHS = (1, 5, 10, 50)


@dataclass(frozen=True)
class PlacedQueries:
    """Queries, and the files of their gallery: `names`, in its order, relative to `folder`."""

    queries: QuerySet
    folder: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSplit:
    """Query sets that a model is judged by. `figures`: from the embeddings of each set, values in [0, 1] by name; `headline` names the
    one that the dataset is compared by."""

    name: str
    headline: str
    sets: tuple[PlacedQueries, ...]
    figures: Callable[[Sequence[Embeddings]], Figures]

    @classmethod
    def of_folder(cls, directory: Path, split: str = "val") -> EvaluationSplit:
        """`val.jsonl` or `test.jsonl` of a folder of JSON lines, by its own protocol. Raises InputError."""
        return cls._of_set(split, load_evaluation_set(directory, triplets=f"{split}.jsonl"), directory / "images")

    @classmethod
    def of_triplets(cls, triplets: Path, images: Path) -> EvaluationSplit:
        """Triplets of one's own over the images that they name, as dqe-eval judges them. Raises InputError."""
        return cls._of_set(triplets.name, load_own_data(triplets, images), images)

    @classmethod
    def _of_set(cls, name: str, evaluation: EvaluationSet, images: Path) -> EvaluationSplit:
        def figures(found: Sequence[Embeddings]) -> Figures:
            report = msgspec.to_builtins(summarise(evaluation, found[0].ranked))
            return {name: value for name, value in report.items() if isinstance(value, float) and not name.startswith("attainable")}

        placed = PlacedQueries(evaluation.queries, images, evaluation.gallery)
        return cls(name, "recall_at_10", (placed,), figures)

    @classmethod
    def of_benchmark(cls, benchmark: Benchmark, images: Path | None = None, *, allow_missing: bool = False) -> EvaluationSplit:
        """The val split of a public dataset, by its own protocol: the answers of its test split are not public. Raises InputError."""
        folder = open_images(benchmark, images)
        sets = []
        for queries in benchmark.query_sets("val", Options(), folder):
            kept, _ = place_queries(queries, folder, allow_missing=allow_missing)
            sets.append(PlacedQueries(kept, folder.root, tuple(folder.names[id] for id in kept.gallery)))

        def figures(found: Sequence[Embeddings]) -> Figures:
            pairs = list(zip(sets, found, strict=True))
            by_set = [benchmark_figures(benchmark.name, s.queries, f) for s, f in pairs]
            found_by_set = [recalls(f.ranked, s.queries.target, DEPTHS) for s, f in pairs]
            means = {name: float(np.mean([each[name].value for each in found_by_set])) for name in found_by_set[0]}
            if len(sets) == 1:
                return by_set[0] | means | summary(benchmark.name, by_set)
            parts = {f"{s.queries.name}/{name}": value for s, each in zip(sets, by_set, strict=True) for name, value in each.items()}
            return means | summary(benchmark.name, by_set) | parts

        return cls("val", benchmark.headline, tuple(sets), figures)

    def require_images(self) -> None:
        """Raise InputError where an image is missing or damaged."""
        for placed in self.sets:
            require_images(placed.folder, placed.names)
            require_readable(placed.folder, placed.names)

    @property
    def identity(self) -> str:
        """Changes when the queries, their galleries or the headline do: figures of two identities are not comparable."""
        asked = [(s.queries.name, s.queries.gallery, [repr(query) for query in s.queries.queries]) for s in self.sets]
        return hashlib.sha256(to_json((self.name, self.headline, asked))).hexdigest()[:32]

    @property
    def images(self) -> int:
        """How many images the galleries hold, those of several counted in each."""
        return sum(len(placed.names) for placed in self.sets)


def judge(
    model: DQEModel, tokenizer: Tokenizer, split: EvaluationSplit, blocks: Callable[[PlacedQueries], Iterable[Tensor]] | None = None,
    *, features: Path | None = None,
) -> Figures:  # fmt: skip
    """Every figure of a split that is a number, of the model as it is, whose mode stays; no random number is drawn.

    `blocks`: the image tokens of a gallery, in order. Without, images are encoded, or come from the feature cache `features`.
    """
    if blocks is None:

        def blocks(placed: PlacedQueries) -> Iterable[Tensor]:
            return image_token_blocks(model, placed.folder, placed.names, features=features)

    with evaluating(model):
        found = [embed(model, tokenizer, placed.queries, blocks(placed)) for placed in split.sets]
    return {name: value for name, value in split.figures(found).items() if math.isfinite(value)}


def judge_checkpoint(directory: Path, split: EvaluationSplit, *, features: Path | None = None) -> Figures:
    """`judge` of a model on disk, on a CUDA device where there is one. Raises CheckpointError."""
    checkpoint = load_checkpoint(directory)
    model = checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return judge(model, checkpoint.tokenizer, split, features=features)
