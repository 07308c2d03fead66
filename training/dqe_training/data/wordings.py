"""Other wordings of the triplets' texts: one is drawn for each triplet and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.vocabulary import AttributeVocabulary

from .records import TripletRecord

_STREAM = 1  # of the random numbers: the order of an epoch is drawn from the stream without it


@dataclass(frozen=True)
class Wordings:
    """W texts beside the triplets' own.

    named: (W, A) bool, the attributes that each names. triplet: (W,) int64, the triplet that each belongs to, ascending.
    """

    texts: tuple[str, ...]
    named: NDArray[np.bool_]
    triplet: NDArray[np.int64]

    @classmethod
    def of(cls, records: Sequence[TripletRecord], vocabulary: AttributeVocabulary) -> Wordings | None:
        """From the records' `wordings`; None where there are none. `named` follows the rule of the triplets' own texts."""
        pairs = [(row, text) for row, record in enumerate(records) for text in record.wordings]
        if not pairs:
            return None

        def named(row: int, text: str) -> list[bool]:
            stated = records[row].attributes
            return list(vocabulary.named_in(text)) if stated is None else [name in stated for name in vocabulary.names]

        return cls(
            texts=tuple(text for _, text in pairs),
            named=np.asarray([named(row, text) for row, text in pairs], bool),
            triplet=np.asarray([row for row, _ in pairs], np.int64),
        )

    def draw(self, triplets: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """(T,) positions: t for triplet t's own text, T + w for its wording w, each with the same chance.

        It depends on seed and epoch alone, so a resumed run reads what an uninterrupted one would.
        """
        others = np.bincount(self.triplet, minlength=triplets)
        first = triplets + np.searchsorted(self.triplet, np.arange(triplets))
        drawn = np.random.default_rng([seed, epoch, _STREAM]).integers(others + 1)
        return np.where(drawn == 0, np.arange(triplets), first + drawn - 1)
