"""What changes that was not asked: attributes of the first ten that differ from the reference's though the text leaves them alone."""

from __future__ import annotations

import numpy as np

from ...data.records import named_values
from ..metrics import F64, PerQuery
from ..probe_report import Figure, Probe
from .asking import TOP, Asking


def leakage(asking: Asking) -> Probe:
    """By attribute: how often it differs from the reference's where the text does not name it, and misses what was asked where it
    does; beside it the same share over the whole gallery, which is what answers drawn by chance would give."""
    labels = asking.labels
    if labels is None or not labels.names:
        return Probe(skipped="no image has attribute labels")
    asked = [named_values(record) for record in labels.records]
    if all(values is None for values in asked):
        return Probe(skipped="no triplet says with `allowed` or `attributes` what its text asks to change")
    by_attribute = {}
    sums: dict[str, list[tuple[F64, F64]]] = {}
    for name in labels.names:
        counts = _counts(asking, name, asked)
        by_attribute[name] = {key: Figure.of(MEANINGS[key], PerQuery(*pair)) for key, pair in counts.items() if pair[1].any()}
        for key, pair in counts.items():
            sums.setdefault(key, []).append(pair)
    figures = {
        key: Figure.of(
            f"{MEANINGS[key]}; over all attributes", PerQuery(np.sum([a for a, _ in pairs], axis=0), np.sum([b for _, b in pairs], axis=0))
        )
        for key, pairs in sums.items()
    }
    valid = [] if labels.relevant is None else [len(answers) for answers in labels.relevant]
    few = f"; a query has {np.mean(valid):.1f} valid answers on average, so not all of the first {TOP} can be right" if valid else ""
    lacking = sum(record.allowed is None for record in labels.records)
    note = f"; {lacking} texts have no `allowed`: the target's value alone counts as met" if lacking else ""
    return Probe(how=f"images whose labels say it{few}{note}", figures=figures, by_attribute=by_attribute)


MEANINGS = {
    "changed_unasked_at_1": "first answers that differ from the reference in an attribute that the text leaves alone",
    "changed_unasked_at_10": "of the first 10, the share that does",
    "changed_unasked_by_chance": "of the whole gallery, the share that does",
    "asked_not_met_at_1": "first answers without a value that the text asks for",
    "asked_not_met_at_10": "of the first 10, the share without",
    "asked_not_met_by_chance": "of the whole gallery, the share without",
}


def _counts(asking: Asking, name: str, asked: list[dict[str, set[str]] | None]) -> dict[str, tuple[F64, F64]]:
    """By figure: the share of wrong images, and whether the query counts, each (Q,)."""
    assert asking.labels is not None
    values = np.asarray([row.get(name, "") for row in asking.labels.attributes], object)
    known = values != ""
    count = len(asking.queries)
    out = {key: (np.zeros(count), np.zeros(count)) for key in MEANINGS}
    for row, wanted in enumerate(asked):
        if wanted is None:
            continue
        reference = asking.queries.reference[row]
        if name in wanted:
            kind, right = "asked_not_met", np.isin(values, list(wanted[name]))
        elif known[reference]:
            kind, right = "changed_unasked", values == values[reference]
        else:
            continue
        others = known.copy()
        others[asking.excluded[row]] = False
        first = asking.found.ranked[row, :TOP]
        for depth, items in (("at_1", first[:1]), (f"at_{TOP}", first), ("by_chance", np.flatnonzero(others))):
            looked_at = items[items >= 0]
            looked_at = looked_at[known[looked_at]]
            if len(looked_at):
                wrong, counted = out[f"{kind}_{depth}"]
                wrong[row], counted[row] = (~right[looked_at]).mean(), 1.0
    return out
