"""The layouts that are imported: how each is known, and what its authors' code does that no tensor shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..config.schema import BaseQuery
from .reading import WeightFile


@dataclass(frozen=True)
class Layout:
    """`title`: for people. `licence`: a note on whose terms apply, which is no legal advice. `queries`: how its authors compose a query, as
    `model.base_query` names it. `is_this`: knows it by its keys. `fit` and `background`: of `PreprocessingSpec`. `unused`: why tensors that
    only this layout has go nowhere."""

    name: str
    title: str
    licence: str
    queries: str
    is_this: Callable[[WeightFile], bool]
    fit: Literal["stretch", "target_pad_crop"] = "target_pad_crop"
    background: tuple[int, int, int] = (0, 0, 0)
    unused: Mapping[str, str] = field(default_factory=dict)


def base_query(layout: Layout) -> tuple[BaseQuery, tuple[str, ...]]:
    """The base query of a layout's models. Where this version's model has not got it, "mean", and a sentence that says so."""
    for kind in get_args(BaseQuery):
        if kind == layout.queries:
            return kind, ()
    theirs = f"as {layout.name} does, by '{layout.queries}'"
    return "mean", (f"queries are composed by 'mean' and not, {theirs}, which this version has not got",)


def is_lavis_like(file: WeightFile) -> bool:
    """Whether the names are those of LAVIS's classes."""
    return "query_tokens" in file.tensors and any(name.startswith("Qformer.bert.") for name in file.tensors)
