"""How many queries the image alone, or the text alone, already answers: such a query does not test composition.

After the audit of arXiv 2605.14787, which drops the one or the other from each query. That work asks many retrievers and checks queries
by hand; here one model is asked, so "only composed" says what this model needs both for, not that a query cannot be guessed.
"""

from __future__ import annotations

from ...data.queries import WORDLESS_TEXT
from ..metrics import PerQuery, hits_at_k
from ..probe_report import Figure, Probe
from .asking import Asking

DEPTHS = (1, 10, 50)


def single_modality(asking: Asking) -> Probe:
    """Recall of the labelled target by each alone, and the share of queries that the composed query alone answers."""
    queries, excluded = asking.queries, asking.excluded
    references = [query.reference for query in queries.queries]
    image = asking.rank(references, [WORDLESS_TEXT] * len(queries), excluded)
    text = asking.rank([None] * len(queries), queries.texts, excluded)
    figures = {}
    for k in DEPTHS:
        both, by_image, by_text = (hits_at_k(ranked, queries.target, k) for ranked in (asking.found.ranked, image, text))
        alone = by_image | by_text
        for name, meaning, values, counted in (
            ("composed", "target found by image and text together", both, 1.0),
            ("image_alone", "target found by the image alone", by_image, 1.0),
            ("text_alone", "target found by the text alone", by_text, 1.0),
            ("either_alone", "target found by one of them alone", alone, 1.0),
            ("only_composed", "target found by both together and by neither alone", both & ~alone, 1.0),
            ("composed_needlessly", "of what both together find, the share that one alone finds too", alone, both),
        ):
            figures[f"{name}_at_{k}"] = Figure.of(f"{meaning}, in the first {k}", PerQuery.of(values, counted))
    how = f'image alone: the text is "{WORDLESS_TEXT}"; text alone: the image is {asking.neutral}; the candidates are the same for all'
    return Probe(how=how, figures=figures)
