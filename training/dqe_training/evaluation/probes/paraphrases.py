"""Do other words for the same change give the same answers? PinPoint (arXiv 2603.04598) measures this with wordings written by people."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from ..metrics import PerQuery, hits_at_k, relative_precision
from ..probe_report import Figure, Probe
from .asking import TOP, Asking, Labels, overlap

WORDINGS = 4
"""How many other wordings of a query are asked, at most."""


def paraphrases(asking: Asking, *, seed: int = 0) -> Probe:
    """Overlap of the first 10 over all pairs of a query's wordings, and whether they agree on having found the target."""
    labels = asking.labels
    if labels is None:
        return Probe(skipped="this dataset does not say which texts are other words for the same")
    said = [_wordings(labels, row, reference, seed) for row, reference in enumerate(asking.queries.reference.tolist())]
    rows = np.asarray([row for row, others in enumerate(said) for _ in others], np.int64)
    if not len(rows):
        return Probe(
            skipped="no triplet has `wordings`, and the labels are not those of garments or tinted, whose grammars know other words"
        )
    texts = [text for others in said for text in others]
    ranked = asking.rank([asking.queries.queries[row].reference for row in rows], texts, [asking.excluded[row] for row in rows])
    # Row by row: the query's own ranking first, then those of its other wordings.
    count = len(asking.queries)
    rankings = np.concatenate([asking.found.ranked[:, : ranked.shape[1]], ranked])
    of = np.concatenate([np.arange(count), rows])
    members = [np.flatnonzero(of == row) for row in range(count)]
    several = np.asarray([len(group) > 1 for group in members])
    hit = hits_at_k(rankings, asking.queries.target[of], TOP)
    agreeing = np.asarray([hit[group].all() or not hit[group].any() for group in members])
    pairs = [(a, b) for group in members for a, b in combinations(group.tolist(), 2)]
    shared = overlap(rankings[[a for a, _ in pairs]], rankings[[b for _, b in pairs]])
    per_pair = np.bincount(of[[a for a, _ in pairs]], minlength=count)
    mean_overlap = np.bincount(of[[a for a, _ in pairs]], weights=shared, minlength=count) / np.maximum(per_pair, 1)
    values = {
        "overlap_at_10": ("Jaccard index of the first 10, mean over the pairs of a query's wordings", mean_overlap),
        "same_outcome_at_10": ("all wordings find the target in the first 10, or none does", agreeing),
        "found_by_all_at_10": ("all wordings find the target in the first 10", np.asarray([hit[group].all() for group in members])),
        "found_by_any_at_10": ("some wording finds the target in the first 10", np.asarray([hit[group].any() for group in members])),
    }
    if labels.relevant is not None:
        precision = relative_precision(rankings, [labels.relevant[row] for row in of], TOP).numerator
        spread = np.asarray([np.ptp(precision[group]) for group in members])
        values["range_of_precision_at_10"] = (
            "highest minus lowest share of valid answers in the first 10, over a query's wordings",
            spread,
        )
    wordings = len(rows) / several.sum()
    source = "`wordings` of the triplets" if any(record.wordings for record in labels.records) else labels.grammar.name
    return Probe(
        how=f"each text and on average {wordings:.1f} others that say the same, at most {WORDINGS}, from {source}",
        figures={name: Figure.of(meaning, PerQuery.of(value, several)) for name, (meaning, value) in values.items()},
    )


def _wordings(labels: Labels, row: int, reference: int, seed: int) -> tuple[str, ...]:
    """A triplet's own other wordings, else those that the dataset's grammar has for it."""
    record = labels.records[row]
    if record.wordings:
        return tuple(dict.fromkeys(text for text in record.wordings if text != record.text))[:WORDINGS]
    if record.allowed is None:
        return ()
    allowed = {name: tuple(values) for name, values in record.allowed.items()}
    return labels.grammar.wordings(record.text, labels.attributes[reference], allowed, WORDINGS, [seed, row])
