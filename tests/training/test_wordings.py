"""Triplets with several wordings: what an epoch reads, and that a resumed run reads the same."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_training import make_trainer, train_config

from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_engine.errors import InputError
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.data.records import TripletRecord, read_jsonl, write_jsonl
from dqe_training.data.triplets import TripletData, build_triplets
from dqe_training.losses.total import BatchLabels, total_loss
from dqe_training.run import step
from dqe_training.run.trainer import data_hash

COLOUR = AttributeVocabulary(attributes=(Attribute(name="colour", words=("red",)), Attribute(name="size", words=("big",))))


def triplet(text: str, *wordings: str, **rest: object) -> TripletRecord:
    return TripletRecord(reference="a", target="b", text=text, wordings=wordings, **rest)


def worded(data: TripletData) -> TripletData:
    """The same triplets; the even ones may also be read in two other wordings."""
    records = [
        TripletRecord(
            reference=r.reference, target=r.target, text=r.text, wordings=() if row % 2 else (f"now {r.text}", f"{r.text} please")
        )
        for row, r in enumerate(data.records)
    ]
    return build_triplets(records, vocabulary())


def test_wordings_are_read_from_json_lines(tmp_path: Path) -> None:
    records = [triplet("red", "in red", "is red"), triplet("big")]
    write_jsonl(tmp_path / "t.jsonl", records)
    assert read_jsonl(tmp_path / "t.jsonl", TripletRecord) == records
    with pytest.raises(InputError, match="mine, record 1: empty text"):
        build_triplets([triplet("red", " ")], COLOUR, where="mine")


def test_every_wording_has_its_chance_and_its_attributes() -> None:
    data = build_triplets(
        [triplet("big and red", "red and big", "red", "big"), triplet("small"), triplet("x", "is red", attributes={})], COLOUR
    )
    assert data.training_texts == ("big and red", "small", "x", "red and big", "red", "big", "is red")
    epochs = 4_000
    seen = np.zeros(7)
    for epoch in range(epochs):
        rows, named = data.draw_texts(seed=3, epoch=epoch)
        seen[rows] += 1
        expected = {0: [1, 1], 3: [1, 1], 4: [1, 0], 5: [0, 1]}[int(rows[0])]
        assert named[0].tolist() == [bool(e) for e in expected]
        assert named[1].tolist() == named[2].tolist() == [False, False]  # by the lexicon; as stated
    chances = np.asarray([1 / 4, 1, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2])
    np.testing.assert_allclose(seen / epochs, chances, rtol=0, atol=4 * 0.5 / epochs**0.5)


def test_a_draw_depends_on_seed_and_epoch_alone() -> None:
    data = build_triplets([triplet("red", "in red", "is red")] * 50, COLOUR)
    first = data.draw_texts(0, 1)[0]
    assert first.tolist() == data.draw_texts(0, 1)[0].tolist()
    assert first.tolist() != data.draw_texts(0, 2)[0].tolist()
    assert first.tolist() != data.draw_texts(1, 1)[0].tolist()


def test_one_text_each_is_read_as_it_is() -> None:
    data = build_triplets([triplet("red"), triplet("big")], COLOUR)
    rows, named = data.draw_texts(0, 5)
    assert data.wordings is None
    assert (rows.tolist(), named.tolist()) == ([0, 1], data.named.tolist())


def test_a_resumed_run_reads_what_an_uninterrupted_one_does(tiny_data: tuple[TripletData, NDArray[np.uint8]], tmp_path: Path) -> None:
    data = worded(tiny_data[0])
    pixels = tiny_data[1][: len(data.images)]
    config = train_config(checkpoint_every=3)
    whole = make_trainer(config, data, pixels, tmp_path / "whole").train()

    class KilledError(Exception):
        pass

    def kill(event: dict[str, object]) -> None:
        if event["event"] == "step" and event["step"] == 8:
            raise KilledError

    with pytest.raises(KilledError):
        make_trainer(config, data, pixels, tmp_path / "cut", listener=kill).train()
    resumed = make_trainer(config, data, pixels, tmp_path / "cut").train()
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), resumed.state_dict()[name].numpy(), err_msg=name)
    plain = build_triplets([msgspec.structs.replace(r, wordings=()) for r in data.records], vocabulary())
    assert data_hash(plain, pixels) != data_hash(data, pixels)  # other wordings are other training data
    other = make_trainer(config, plain, pixels, tmp_path / "plain").train()
    assert any((other.state_dict()[name] != value).any() for name, value in whole.state_dict().items())


def test_a_step_is_told_what_its_own_wording_names(
    tiny_data: tuple[TripletData, NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The presence signal is of the text that was read, not of the triplet's first text."""
    records = [
        TripletRecord(reference=r.reference, target=r.target, text="in red with dots", wordings=("in red", "with dots"))
        for r in tiny_data[0].records
    ]
    data = build_triplets(records, vocabulary())
    told: list[NDArray[np.bool_]] = []

    def recorded(output: object, tokens: object, labels: BatchLabels, *rest: object, **options: object) -> object:
        told.append(labels.named.numpy().copy())
        return total_loss(output, tokens, labels, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "total_loss", recorded)
    make_trainer(train_config(epochs=1), data, tiny_data[1][: len(data.images)], tmp_path / "run").train()
    order = np.random.default_rng([0, 0]).permutation(len(data))
    _, named = data.draw_texts(0, 0)
    np.testing.assert_array_equal(np.concatenate(told), named[order])
    assert (named != data.named).any()
