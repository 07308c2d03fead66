"""Which images answer a triplet's text, by exact labels: for what is logged and audited, never for training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.vocabulary import AttributeVocabulary

from .records import allowed_values
from .triplets import TripletData


@dataclass(frozen=True, eq=False)
class Answers:
    """Right values of T triplets: the values that the text allows, and the reference's for attributes that it does not name.

    right: (T, A, V) bool, whether a value answers the triplet; V is the longest list of values. labels: (I, A) int64, value positions.
    """

    right: NDArray[np.bool_]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, data: TripletData, vocabulary: AttributeVocabulary) -> Answers | None:
        """None where the labels do not tell: there must be attributes, every triplet must say what it allows, every image show a value of
        every attribute."""
        attributes = vocabulary.attributes
        told = all(record.allowed is not None for record in data.records) and not (data.labels < 0).any()
        if not attributes or not told or not all(a.values for a in attributes):
            return None
        right = np.zeros((len(data), len(attributes), max(len(a.values) for a in attributes)), bool)
        index = [{value: at for at, value in enumerate(a.values)} for a in attributes]
        for row, record in enumerate(data.records):
            shown = data.labels[data.reference[row]].tolist()  # (A,)
            valid = allowed_values(record, {a.name: a.values[value] for a, value in zip(attributes, shown, strict=True)})
            for a, attribute in enumerate(attributes):
                right[row, a, [index[a][value] for value in valid[attribute.name]]] = True
        return cls(right, data.labels)

    def wrong(self, rows: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.int64]:
        """(S, P): in how many attributes image `images[s, p]` differs from what triplet `rows[s]` asks for."""
        wrong = np.zeros(images.shape, np.int64)
        for a in range(self.right.shape[1]):
            wrong += ~np.take_along_axis(self.right[rows, a], self.labels[images, a], axis=1)
        return wrong

    def among(self, rows: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(S, P): whether image `images[p]` answers triplet `rows[s]`."""
        return self.wrong(rows, np.broadcast_to(images, (len(rows), len(images)))) == 0
