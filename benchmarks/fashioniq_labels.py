"""Precision of the value labels derived from FashionIQ's captions, from verdicts given by hand.

`results/fashioniq-labels/judged.json` has rows `[caption file, row, attribute, derived value, right?, kind of error]`. Right means
that a person who reads the triplet's two captions would say so of the target; nobody looked at the images. The person who judged
wrote the rules too.

- `reported`: 200 triplets of the validation captions, drawn once the rules were done; none of them had been read before.
- `rare`: as many more triplets as give 60 with a label of length, neckline and shape; that one label judged.
- `last_tuned`: the last of several samples of the training captions on which the rules were made, 200 triplets. No rule was
  changed because of it, but some of its rows may have been read in an earlier one.

    python -m benchmarks.fashioniq_labels FASHIONIQ            the table of docs/attributes.md, each sample, and where today's rules differ
    python -m benchmarks.fashioniq_labels FASHIONIQ --draw 50  other triplets to judge, with their captions
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_training.data.derived_labels import read_triplet, statements
from dqe_training.data.public.fashioniq import CATEGORIES, CaptionedPair, join_captions
from dqe_training.data.records import TripletRecord
from dqe_training.data.vocabularies import dataset_vocabulary

from .statistics import wilson

JUDGED = Path(__file__).parent / "results" / "fashioniq-labels" / "judged.json"


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    file: str
    row: int
    attribute: str
    value: str
    right: bool
    error: str = ""


def read_verdicts(path: Path = JUDGED) -> dict[str, list[Verdict]]:
    """Verdicts by sample."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, list[Verdict]])


def read_captions(directory: Path, file: str) -> list[TripletRecord]:
    """The triplets of one caption file, in its order."""
    pairs = msgspec.json.decode((directory / "captions" / file).read_bytes(), type=list[CaptionedPair])
    texts = [join_captions(pair.captions) for pair in pairs]
    return [
        TripletRecord(reference=pair.candidate, target=pair.target or "", text=text.text, wordings=text.wordings)
        for pair, text in zip(pairs, texts, strict=True)
    ]


def derived(record: TripletRecord, vocabulary: AttributeVocabulary) -> dict[str, str]:
    """Attribute to value, from the triplet's texts."""
    said = zip(vocabulary.attributes, read_triplet(record, vocabulary), strict=True)
    return {attribute.name: attribute.values[one.value] for attribute, one in said if one.value >= 0}


def changed(directory: Path, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts on labels that today's rules and vocabulary do not give: such rows have to be judged again."""
    vocabulary = dataset_vocabulary("fashioniq")
    records = {file: read_captions(directory, file) for file in {verdict.file for verdict in verdicts}}
    return [v for v in verdicts if derived(records[v.file][v.row], vocabulary).get(v.attribute) != v.value]


def pooled(samples: dict[str, list[Verdict]]) -> list[str]:
    """Per attribute, over both samples of the validation captions; in all, over the triplets that were drawn whatever they name."""
    return table([*samples["reported"], *samples["rare"]])[:-1] + table(samples["reported"])[-1:]


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Per attribute and in all: right of judged, with the 95 % interval."""
    lines = []
    for name in (*dict.fromkeys(v.attribute for v in verdicts), "all"):
        rights = [v.right for v in verdicts if name in (v.attribute, "all")]
        low, high = wilson(sum(rights), len(rights))
        lines.append(f"{name:9} {sum(rights):4} of {len(rights):4}  {sum(rights) / len(rights):6.1%}  ({low:.1%} to {high:.1%})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="FASHIONIQ", help="folder with captions/")
    parser.add_argument("--draw", type=int, metavar="N", help="print N triplets that have a label, with their captions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.draw:
        vocabulary = dataset_vocabulary("fashioniq")
        files = [f"cap.{category}.train.json" for category in CATEGORIES]
        rows = [(file, row, record) for file in files for row, record in enumerate(read_captions(options.directory, file))]
        labelled = [(file, row, record) for file, row, record in rows if derived(record, vocabulary)]
        for file, row, record in random.Random(options.seed).sample(labelled, options.draw):
            print(file, row, " | ".join(statements(record)), "=>", derived(record, vocabulary))
        return
    samples = read_verdicts()
    print("validation captions: both samples by attribute, all of `reported` alone", *pooled(samples), sep="\n  ")
    for sample, verdicts in samples.items():
        print(f"{sample}: {len({(v.file, v.row) for v in verdicts})} triplets", *table(verdicts), sep="\n  ")
        for verdict in changed(options.directory, verdicts):
            print(f"  no longer derived: {verdict.file} {verdict.row} {verdict.attribute} {verdict.value}")


if __name__ == "__main__":
    main()
