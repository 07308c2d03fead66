"""Validation while training: when it is due, what it finds, and which model is the best so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..checkpointing.meta import Validated
from ..data.images import load_pixels
from ..encoding import ENCODE_BATCH, Listener, TokenTable, encode_image_tokens
from ..evaluation.split import EvaluationSplit, PlacedQueries, judge
from ..features import cached_tokens
from ..model import DQEModel

BEST = "best"
"""The folder of a run that holds the best model so far, beside its `step-*` checkpoints."""


@dataclass(frozen=True)
class Validation:
    """What a training is judged by, and how often: after every `every` steps, 0 after every epoch, and at its end."""

    split: EvaluationSplit
    every: int = 0


class Validator:
    """Judges `model` by the queries of a validation. Nothing that training goes on with is changed.

    With a `frozen` tower the gallery's image tokens are computed once: held in memory in float32, or read from the feature cache
    `features`. Else images are decoded and encoded for each validation.
    """

    def __init__(self, validation: Validation, *, frozen: bool, features: Path | None) -> None:
        self.split, self._every = validation.split, validation.every
        self.identity = self.split.identity
        self._frozen, self._features = frozen, features
        self._tables: dict[int, TokenTable] = {}

    def due(self, step: int, steps_per_epoch: int) -> bool:
        return step % (self._every or steps_per_epoch) == 0

    def prepare(self, model: DQEModel, listener: Listener) -> None:
        """Look at the images, and encode them where the tower is frozen. Raises InputError for one that is missing or damaged."""
        self.split.require_images()
        if self._frozen:
            for placed in self.split.sets:
                self._tables[id(placed)] = self._encode(model, placed.folder, placed.names, listener)

    def _encode(self, model: DQEModel, folder: Path, names: Sequence[str], listener: Listener) -> TokenTable:
        if self._features is not None:
            return cached_tokens(self._features, model, folder, names, listener=listener)
        pixels = load_pixels(folder, names, model.config.preprocessing)
        return encode_image_tokens(model, pixels, dtype=torch.float32, listener=listener)

    def validate(self, model: DQEModel, tokenizer: Tokenizer, step: int) -> Validated:
        """What the model finds after `step` steps."""
        figures = judge(model, tokenizer, self.split, self._blocks if self._frozen else None)
        return Validated(step=step, split=self.identity, headline=self.split.headline, figures=figures)

    def _blocks(self, placed: PlacedQueries) -> Iterable[Tensor]:
        table = self._tables[id(placed)]
        return (table[rows] for rows in torch.arange(len(placed.names)).split(ENCODE_BATCH))
