"""Does "not red" mean anything to the model? Texts that rule out the reference's own value, against the same texts without the "not"."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..metrics import PerQuery, relative_precision
from ..probe_report import Figure, Probe
from .asking import TOP, Asking, Labels, overlap


class Case(NamedTuple):
    """One query of the set, turned into three about one attribute of its reference.

    `negated` rules out the reference's value, `plain` is that text without the negation, `affirmed` asks for another value. Valid
    answers are as the reference in every other attribute; of the attribute they have any other value, or the value asked for.
    """

    row: int
    attribute: str
    negated: str
    plain: str
    affirmed: str
    negated_valid: tuple[int, ...]
    affirmed_valid: tuple[int, ...]


def negation(asking: Asking, *, seed: int = 0) -> Probe:
    """Recall and precision over the valid answers of negated texts, beside affirmative ones about the same attributes, and how often the
    value that was ruled out is shown."""
    labels = asking.labels
    if labels is None or not labels.names:
        return Probe(skipped="no image has attribute labels")
    cases = _cases(asking, labels, seed)
    if not cases:
        return Probe(skipped="no reference has images that are like it but for one attribute")
    excluded = [[int(asking.queries.reference[case.row])] for case in cases]
    references = [asking.queries.queries[case.row].reference for case in cases]
    negated, plain, affirmed = (
        asking.rank(references, texts, excluded)
        for texts in ([c.negated for c in cases], [c.plain for c in cases], [c.affirmed for c in cases])
    )
    values = [labels.attributes[asking.queries.reference[case.row]][case.attribute] for case in cases]
    chance = [np.mean([row.get(c.attribute) == v for row in labels.attributes]) for c, v in zip(cases, values, strict=True)]
    figures: dict[str, tuple[str, PerQuery]] = {}
    for name, text, ranked, valid in (
        ("negated", "negated text", negated, [case.negated_valid for case in cases]),
        ("affirmed", "affirmative text", affirmed, [case.affirmed_valid for case in cases]),
    ):
        figures |= {
            f"{name}_hit_at_10": (f"{text}: a valid answer in the first 10", _any_valid(ranked, valid)),
            f"{name}_recall_at_10": (f"{text}: the share of the valid answers that is in the first 10", _recall(ranked, valid)),
            f"{name}_precision_at_10": (
                f"{text}: valid answers in the first 10, over the most there could be", relative_precision(ranked, valid, TOP),
            ),
        }  # fmt: skip
    figures |= {
        "shows_what_was_ruled_out": (
            "of the negated text's first 10, the share that shows the value ruled out", _shows(labels, negated, cases, values),
        ),
        "shows_it_without_the_not": ("the same text without its negation, which asks for that value", _shows(labels, plain, cases, values)),
        "shows_it_by_chance": ("the same of the whole gallery", PerQuery.of(chance)),
        "overlap_without_the_not": ("Jaccard index of the first 10 with and without it", PerQuery.of(overlap(negated, plain))),
    }  # fmt: skip
    about = np.asarray([case.attribute for case in cases], object)
    return Probe(
        how=f'{len(cases)} references, one attribute each, such as "{cases[0].negated}"; texts from {labels.grammar.name}; '
        "valid answers are as the reference but for that attribute: "
        f"{np.mean([len(c.negated_valid) for c in cases]):.1f} on average for the negated text, "
        f"{np.mean([len(c.affirmed_valid) for c in cases]):.1f} for the affirmative one",
        figures={name: Figure.of(meaning, figure) for name, (meaning, figure) in figures.items()},
        by_attribute={
            attribute: {name: Figure.of(*_only(figures[name], about == attribute)) for name in _BY_ATTRIBUTE}
            for attribute in dict.fromkeys(about.tolist())
        },
    )


_BY_ATTRIBUTE = ("negated_hit_at_10", "affirmed_hit_at_10", "shows_what_was_ruled_out", "shows_it_without_the_not")


def _only(figure: tuple[str, PerQuery], rows: NDArray[np.bool_]) -> tuple[str, PerQuery]:
    meaning, values = figure
    return meaning, PerQuery(values.numerator[rows], values.denominator[rows])


def _cases(asking: Asking, labels: Labels, seed: int) -> list[Case]:
    """At most one a query: the attributes take turns, and another one is taken where an answer is lacking."""
    columns = {name: np.asarray([row.get(name, "") for row in labels.attributes], object) for name in labels.names}
    found: dict[tuple[int, str], Case] = {}
    for row, reference in enumerate(asking.queries.reference.tolist()):
        for turn in range(len(labels.names)):
            attribute = labels.names[(row + turn) % len(labels.names)]
            value = columns[attribute][reference]
            if not value or (reference, attribute) in found:  # a reference that comes again is asked about something else
                continue
            alike = np.ones(len(labels.attributes), bool)
            for name, column in columns.items():
                alike &= (column == column[reference]) if name != attribute else (column != value) & (column != "")
            alike[reference] = False
            valid = np.flatnonzero(alike)
            if not len(valid):
                continue
            rng = np.random.default_rng([seed, row])
            others = sorted(set(columns[attribute][valid].tolist()))
            wanted = others[int(rng.integers(len(others)))]
            statements = labels.grammar.statements(attribute, value)
            form = int(rng.integers(len(statements)))
            plain, negated = statements[form]
            affirmed, _ = labels.grammar.statements(attribute, wanted)[form]
            found[reference, attribute] = Case(
                row, attribute, negated, plain, affirmed, tuple(valid.tolist()), tuple(valid[columns[attribute][valid] == wanted].tolist())
            )
            break
    return list(found.values())


def _any_valid(ranked: NDArray[np.int64], valid: list[tuple[int, ...]]) -> PerQuery:
    return PerQuery.of([bool(np.isin(row[:TOP], wanted).any()) for row, wanted in zip(ranked, valid, strict=True)])


def _recall(ranked: NDArray[np.int64], valid: list[tuple[int, ...]]) -> PerQuery:
    return PerQuery.of([np.isin(row[:TOP], wanted).sum() / len(wanted) for row, wanted in zip(ranked, valid, strict=True)])


def _shows(labels: Labels, ranked: NDArray[np.int64], cases: list[Case], values: list[str]) -> PerQuery:
    """The share of the first 10, of those with a label, that has the value."""
    shares, counted = np.zeros(len(cases)), np.zeros(len(cases))
    for at, (case, value) in enumerate(zip(cases, values, strict=True)):
        labelled = [label for item in ranked[at, :TOP].tolist() if item >= 0 and (label := labels.attributes[item].get(case.attribute))]
        shares[at], counted[at] = np.mean([label == value for label in labelled]) if labelled else 0.0, float(bool(labelled))
    return PerQuery.of(shares, counted)
