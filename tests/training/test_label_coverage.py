"""What the attribute losses have to work with, counted and said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_training.data.label_coverage import label_coverage
from dqe_training.data.records import TripletRecord
from dqe_training.data.triplets import TripletData, build_triplets
from dqe_training.losses.attribute_margin import attribute_margin_loss

VOCABULARY = AttributeVocabulary(
    attributes=(Attribute(name="colour", values=("red", "blue"), words=("colour",)), Attribute(name="size", values=("big", "small")))
)


def triplets(*texts: str) -> TripletData:
    return build_triplets([TripletRecord(reference="r", target=f"t{i}", text=text) for i, text in enumerate(texts)], VOCABULARY)


def test_shares_and_pairs() -> None:
    found = label_coverage(triplets("is red", "is blue", "another colour", "is big", "nothing"), VOCABULARY, batch=2)
    colour, size = found.attributes
    assert (colour.named, colour.labelled, colour.active) == (0.6, 0.4, 2)
    assert (size.named, size.labelled, size.active) == (0.2, 0.2, 0)  # no target of another size
    assert found.nameless == pytest.approx(0.2)
    assert found.margin_active
    assert found.pairs_in_batch == pytest.approx(2 * (2 / 5) * (1 / 4))  # each of two rows meets the other with chance 1/4
    assert found.message().startswith("attribute margin acts on 0.2 (triplet, attribute) pairs of a batch of 2; ")
    assert "\n" not in found.message()


def test_the_expected_pairs_are_those_that_the_loss_counts() -> None:
    rng = np.random.default_rng(0)
    data = triplets(*rng.choice(["is red", "is blue", "is big and red", "small", "nothing", "a colour"], 200))
    batch, counts = 8, []
    for _ in range(300):
        rows = rng.choice(len(data), batch, replace=False)
        labels, named = torch.from_numpy(data.labels[data.target[rows]]), torch.from_numpy(data.named[rows])
        # With a margin above every difference of cosines the loss is the mean of margin - positive + hardest over what counts;
        # all scores equal, it is the margin if anything counts. Counting: give each pair in turn the whole say.
        counts.append(
            sum(
                float(attribute_margin_loss(torch.zeros(batch, 2, batch), labels, named & mask, margin=1.0))
                for mask in torch.eye(batch * 2, dtype=torch.bool).view(-1, batch, 2)
            )
        )
    expected = label_coverage(data, VOCABULARY, batch=batch).pairs_in_batch
    assert np.mean(counts) == pytest.approx(expected, rel=0, abs=4 * np.std(counts) / len(counts) ** 0.5)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("another colour", "nothing"), "no target has a value label; give the triplets `attributes`"),
        (("is red", "is crimson red"), "no named attribute has targets of two values"),
    ],
)
def test_inactive_is_said_with_the_reason(texts: tuple[str, ...], reason: str) -> None:
    found = label_coverage(triplets(*texts), VOCABULARY, batch=64)
    assert not found.margin_active
    assert found.presence_active
    assert found.pairs_in_batch == 0
    assert found.message().startswith("attribute margin inactive: ")
    assert reason in found.message()


def test_labels_without_names() -> None:
    records = [
        TripletRecord(reference="r", target="a", text="x", attributes={"colour": "red"}),
        TripletRecord(reference="r", target="b", text="x", attributes={"colour": "blue"}),
    ]
    data = build_triplets(records, VOCABULARY)
    nameless = TripletData(**(vars(data) | {"named": np.zeros_like(data.named)}))
    found = label_coverage(nameless, VOCABULARY, batch=64)
    assert not found.presence_active
    assert "no text names an attribute" in found.message()
    assert label_coverage(data, VOCABULARY, batch=64).margin_active


def test_one_triplet_is_inactive() -> None:
    assert not label_coverage(triplets("is red"), VOCABULARY, batch=1).margin_active


def test_inactive_is_a_loss_of_zero() -> None:
    data = triplets("another colour", "nothing", "something else")
    scores = F.normalize(torch.randn(3, 2, 3), dim=-1)
    labels = torch.from_numpy(data.labels[data.target])
    assert attribute_margin_loss(scores, labels, torch.from_numpy(data.named), margin=0.2).item() == 0
