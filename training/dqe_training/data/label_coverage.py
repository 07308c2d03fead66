"""What the attribute losses have to work with: said before training, since a loss without labels is silently zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dqe_engine.contracts.vocabulary import AttributeVocabulary

from .triplets import TripletData


@dataclass(frozen=True)
class AttributeCoverage:
    """named: share of the triplets whose text names the attribute. labelled: share of the triplets whose target has a value
    label for it. active: number of triplets that do both, and whose value some other target does not have: those on which the
    attribute margin can act."""

    name: str
    named: float
    labelled: float
    active: int


@dataclass(frozen=True)
class LabelCoverage:
    """attributes: in vocabulary order. pairs_in_batch: expected number of (triplet, attribute) pairs on which the margin acts
    in a batch of `batch` triplets drawn at random. nameless: share of the triplets whose text names no attribute."""

    triplets: int
    attributes: tuple[AttributeCoverage, ...]
    batch: int
    pairs_in_batch: float
    nameless: float

    @property
    def margin_active(self) -> bool:
        """Whether the attribute margin can act on any triplet."""
        return any(attribute.active for attribute in self.attributes)

    @property
    def presence_active(self) -> bool:
        """Whether any text names an attribute: without, the weights are only pushed to 0."""
        return any(attribute.named > 0 for attribute in self.attributes)

    def message(self) -> str:
        """One line. It begins with "attribute margin inactive" where that loss cannot act, with the reason and the remedy."""
        each = ", ".join(f"{a.name} {100 * a.named:.0f}/{100 * a.labelled:.0f}" for a in self.attributes)
        shares = f"% of {self.triplets} triplets that name / whose target has a value: {each}; {100 * self.nameless:.0f} % name none"
        if self.margin_active:
            return f"attribute margin acts on {self.pairs_in_batch:.1f} (triplet, attribute) pairs of a batch of {self.batch}; {shares}"
        if not any(a.labelled for a in self.attributes):
            reason = "no target has a value label; give the triplets `attributes`, or the vocabulary `values` that the texts state"
        elif not any(a.named for a in self.attributes):
            reason = "no text names an attribute; give the vocabulary the texts' words"
        else:
            reason = "no named attribute has targets of two values"
        return f"attribute margin inactive: {reason}; {shares}"


def label_coverage(data: TripletData, vocabulary: AttributeVocabulary, *, batch: int) -> LabelCoverage:
    """Count, from arrays alone; `batch`: triplets in a batch.

    A pair (i, a) counts in a batch when text i names a, target i has a value for it, and another target of the batch has a
    different one: with probability 1 - (1 - d / (T - 1)) ^ (batch - 1), where d of the other triplets' targets differ.
    """
    labels = data.labels[data.target]  # (T, A)
    count = len(data)
    coverages, pairs = [], 0.0
    for at, attribute in enumerate(vocabulary.attributes):
        column = labels[:, at]
        values, inverse, sizes = np.unique(column[column >= 0], return_inverse=True, return_counts=True)
        differing = np.zeros(count, np.int64)
        if values.size:
            differing[column >= 0] = sizes.sum() - sizes[inverse]
        acts = data.named[:, at] & (differing > 0)
        chance = 1 - (1 - differing[acts] / max(count - 1, 1)).clip(0) ** (batch - 1)
        pairs += float(chance.sum()) * batch / max(count, 1)
        coverages.append(AttributeCoverage(attribute.name, float(data.named[:, at].mean()), float((column >= 0).mean()), int(acts.sum())))
    return LabelCoverage(count, tuple(coverages), batch, pairs, float((~data.named.any(axis=1)).mean()))
