"""The vocabularies that ship with the package, one for each public dataset whose captions were counted for it."""

from __future__ import annotations

from importlib.resources import files

from dqe_engine.contracts.parsing import parse_json
from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY, AttributeVocabulary


def dataset_vocabulary(dataset: str) -> AttributeVocabulary:
    """The vocabulary that ships for the public dataset of this name ("fashioniq", "cirr"), else the paper's colour and shape."""
    file = files("dqe_training.vocabularies").joinpath(f"{dataset}.json")
    return parse_json(AttributeVocabulary, file.read_bytes(), where=file.name) if file.is_file() else PAPER_VOCABULARY
