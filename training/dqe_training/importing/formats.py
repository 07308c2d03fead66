"""The layouts that are imported: how each is known, and what its authors' code does that no tensor shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..config.schema import BaseQuery
from .reading import WeightFile

QUERIES: Mapping[str, str] = {
    "lavis": "zero_shot", "sprc": "two_pass", "spn4cir": "two_encoders", "qure": "mean", "transformers": "zero_shot",
}  # fmt: skip
"""`model.base_query` of each layout: how its authors compose a query. The one place."""


def base_query(layout: str) -> tuple[BaseQuery, tuple[str, ...]]:
    """The base query of a layout's models. Where this version's model has not got it, "mean", and a sentence that says so."""
    wanted = QUERIES[layout]
    for kind in get_args(BaseQuery):
        if kind == wanted:
            return kind, ()
    return "mean", (f"queries are composed by 'mean' and not, as {layout} does, by '{wanted}', which this version has not got",)


@dataclass(frozen=True)
class Layout:
    """`title`: for people. `licence`: a note on whose terms apply, which is no legal advice. `fit` and `background`: of
    `PreprocessingSpec`. `unused`: why tensors that only this layout has go nowhere. `is_this`: knows it by its keys."""

    name: str
    title: str
    licence: str
    is_this: Callable[[WeightFile], bool]
    fit: Literal["stretch", "target_pad_crop"] = "target_pad_crop"
    background: tuple[int, int, int] = (0, 0, 0)
    unused: Mapping[str, str] = field(default_factory=dict)


def is_lavis_like(file: WeightFile) -> bool:
    """Whether the names are those of LAVIS's classes."""
    return "query_tokens" in file.tensors and any(name.startswith("Qformer.bert.") for name in file.tensors)
