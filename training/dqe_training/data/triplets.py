"""A triplet dataset in arrays: what the trainer and the evaluation index into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer
from torch import Tensor

from dqe_engine.captions import blip_caption
from dqe_engine.contracts.parsing import parse_json
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, read_regular

from .derived_labels import derive_labels
from .records import ImageRecord, TripletRecord, check_texts, read_jsonl
from .wordings import Wordings


def read_vocabulary(path: Path) -> AttributeVocabulary:
    """An attribute vocabulary from JSON. Raises InputError."""
    try:
        raw = read_regular(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such vocabulary file") from error
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
    return parse_json(AttributeVocabulary, raw, where=str(path))


@dataclass(frozen=True)
class TripletData:
    """T triplets over I images. Image positions index `images`.

    images: names relative to the image folder. reference, target: (T,) int64 image positions.
    named: (T, A) bool, whether the text names the attribute: from the triplet's `attributes`, else by the vocabulary's
    words and values. labels: (I, A) int64 value positions, -1 unknown. wordings: None where every triplet has one text.
    references_ranked: whether the dataset's protocol leaves a query's reference in its own ranking (FashionIQ does).
    """

    images: tuple[str, ...]
    texts: tuple[str, ...]
    reference: NDArray[np.int64]
    target: NDArray[np.int64]
    named: NDArray[np.bool_]
    labels: NDArray[np.int64]
    records: tuple[TripletRecord, ...]
    wordings: Wordings | None = None
    references_ranked: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def excluded(self) -> NDArray[np.int64]:
        """(T, 1): what, beside its target, can be no negative of a triplet: its reference; -1, nothing, where references are ranked."""
        return np.full_like(self.reference, -1)[:, None] if self.references_ranked else self.reference[:, None]

    @property
    def training_texts(self) -> tuple[str, ...]:
        """The triplets' texts, row by row, then their other wordings."""
        return self.texts if self.wordings is None else self.texts + self.wordings.texts

    def draw_texts(self, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """What each triplet reads in an epoch: (T,) rows of `training_texts`, and `named` (T, A) of these."""
        if self.wordings is None:
            return np.arange(len(self)), self.named
        rows = self.wordings.draw(len(self), seed, epoch)
        return rows, np.concatenate([self.named, self.wordings.named])[rows]


def _value_index(vocabulary: AttributeVocabulary) -> list[dict[str, int]]:
    return [{value: i for i, value in enumerate(a.values)} for a in vocabulary.attributes]


def _with_observed_values(vocabulary: AttributeVocabulary, attributes: Sequence[dict[str, str]]) -> AttributeVocabulary:
    """The vocabulary, with the values that occur filled in for attributes that list none: labels are then comparable."""
    return AttributeVocabulary(
        attributes=tuple(
            a if a.values else msgspec.structs.replace(a, values=tuple(sorted({row[a.name] for row in attributes if a.name in row})))
            for a in vocabulary.attributes
        )
    )


def _label_row(attributes: dict[str, str], vocabulary: AttributeVocabulary, index: list[dict[str, int]], where: str) -> list[int]:
    row = []
    for attribute, values in zip(vocabulary.attributes, index, strict=True):
        value = attributes.get(attribute.name)
        if value is not None and values and value not in values:
            raise InputError(f"{where}: {attribute.name} is {value!r}; the vocabulary has {', '.join(values)}")
        row.append(-1 if value is None else values.get(value, -1))
    return row


def _check_attributes(names: Iterable[str], vocabulary: AttributeVocabulary, where: str) -> None:
    if vocabulary.names and (unknown := set(names) - set(vocabulary.names)):  # without attributes, labels are of no use, and no error
        raise InputError(f"{where}: unknown attribute {sorted(unknown)[0]!r}; the vocabulary has {', '.join(vocabulary.names)}")


def _check_allowed(record: TripletRecord, vocabulary: AttributeVocabulary, where: str) -> None:
    """Raise InputError where `allowed` has a value that the vocabulary does not list; an attribute that lists none may have any."""
    for attribute in vocabulary.attributes:
        for value in (record.allowed or {}).get(attribute.name, ()):
            if attribute.values and value not in attribute.values:
                raise InputError(
                    f"{where}, target {record.target}: `allowed` of {attribute.name} has {value!r}; "
                    f"the vocabulary has {', '.join(attribute.values)}"
                )


def build_triplets(
    records: Sequence[TripletRecord],
    vocabulary: AttributeVocabulary,
    *,
    image_records: Sequence[ImageRecord] = (),
    references_ranked: bool = False,
    guessed: Sequence[ImageRecord] = (),
    derive: bool = True,
    where: str = "triplets",
) -> TripletData:
    """Arrays from records. `image_records` label images (any that no triplet uses are added to the images).

    What `image_records` do not say of a target, its triplets' `attributes` do; what these do not say either, the texts of its
    triplets without `attributes` do, with `derive` (docs/attributes.md has the rules), and then `guessed`, labels of images
    that are less sure than a text.
    """
    check_texts(records, where=where)
    stated = [r.attributes or {} for r in records]
    filled = _with_observed_values(vocabulary, [*stated, *(r.attributes for r in image_records)])
    names = dict.fromkeys(name for r in records for name in (r.reference, r.target))
    images = tuple(dict.fromkeys([*names, *(r.image for r in image_records)]))
    position = {name: i for i, name in enumerate(images)}
    index = _value_index(filled)
    labels = np.full((len(images), len(index)), -1, np.int64)
    named = np.zeros((len(records), len(index)), bool)
    for row, record in enumerate(records):
        _check_attributes((*(record.attributes or ()), *(record.allowed or ())), vocabulary, where)
        _check_allowed(record, vocabulary, where)
        if record.attributes is None:
            named[row] = vocabulary.named_in(record.text)
            continue
        named[row] = [name in record.attributes for name in vocabulary.names]
        row_labels = np.asarray(_label_row(record.attributes, filled, index, f"{where}, target {record.target}"))
        at = position[record.target]
        labels[at] = np.where(row_labels >= 0, row_labels, labels[at])
    if image_records:
        rows = [position[r.image] for r in image_records]
        given = label_images(image_records, filled)
        labels[rows] = np.where(given >= 0, given, labels[rows])
    if derive:
        derived = derive_labels(records, vocabulary)
        _fill(labels, {position[image]: row for image, row in derived.items()})
    _fill(labels, {position[r.image]: row for r, row in zip(guessed, label_images(guessed, filled), strict=True) if r.image in position})
    return TripletData(
        images=images,
        texts=tuple(r.text for r in records),
        reference=np.asarray([position[r.reference] for r in records], np.int64),
        target=np.asarray([position[r.target] for r in records], np.int64),
        named=named,
        labels=labels,
        records=tuple(records),
        wordings=Wordings.of(records, vocabulary),
        references_ranked=references_ranked,
    )


def _fill(labels: NDArray[np.int64], rows: Mapping[int, ArrayLike]) -> None:
    """Put values into `labels` where these are unknown; `rows` by image position."""
    for at, row in rows.items():
        labels[at] = np.where(labels[at] >= 0, labels[at], row)


def load_triplets(
    path: Path, vocabulary: AttributeVocabulary, *, image_labels: Path | None = None, prefix: str = "", derive: bool = True
) -> TripletData:
    """Read `path` (JSON lines of triplets) and, where given, `image_labels` (JSON lines of image attributes).

    `prefix` keeps only the labelled images whose name starts with it: a split of a dataset. `derive`: as in `build_triplets`.
    """
    images = [r for r in read_jsonl(image_labels, ImageRecord) if r.image.startswith(prefix)] if image_labels else []
    return build_triplets(read_jsonl(path, TripletRecord), vocabulary, image_records=images, derive=derive, where=str(path))


def label_images(records: Sequence[ImageRecord], vocabulary: AttributeVocabulary) -> NDArray[np.int64]:
    """(I, A) int64 value positions of labelled images, -1 where a label is missing. Raises InputError for a foreign value."""
    index = _value_index(vocabulary)
    return np.asarray([_label_row(r.attributes, vocabulary, index, f"image {r.image}") for r in records], np.int64).reshape(
        len(records), len(index)
    )


class TextBatcher:
    """Texts tokenised once; `__call__(rows)` gives padded (B, L) int64 ids and mask, L the batch's longest.

    `captions`: `ModelConfig.captions`, what becomes of a text first."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int, captions: str, pad_id: int = 0) -> None:
        tokenizer.enable_truncation(max_length)
        tokenizer.no_padding()
        texts = [blip_caption(text) for text in texts] if captions == "blip" else list(texts)
        ids = [e.ids for e in tokenizer.encode_batch(texts)]
        width = max((len(i) for i in ids), default=2)
        self._lengths = torch.tensor([len(i) for i in ids])
        self._ids = torch.full((len(ids), width), pad_id, dtype=torch.int64)
        for row, tokens in enumerate(ids):
            self._ids[row, : len(tokens)] = torch.tensor(tokens)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self._lengths[rows]
        width = int(lengths.max())
        mask = (torch.arange(width)[None, :] < lengths[:, None]).to(torch.int64)
        return self._ids[rows, :width], mask
