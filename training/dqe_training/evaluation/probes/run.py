"""All probes of one ranked query set."""

from __future__ import annotations

from dqe_engine.errors import InputError

from ...data.queries import QuerySet
from ..probe_report import ProbeReport
from .asking import Asking
from .leakage import leakage
from .negation import negation
from .paraphrases import paraphrases
from .single_modality import single_modality


def require_targets(queries: QuerySet) -> None:
    """Raise InputError where a query has no labelled target: secret ones, and HP-FashionIQ's."""
    if lacking := int((queries.target < 0).sum()):
        raise InputError(
            f"{queries.name}: {lacking} of {len(queries)} queries have no target that is known, which probes need; leave out --probes"
        )


def run_probes(asking: Asking) -> ProbeReport:
    """Raises InputError for queries without targets."""
    require_targets(asking.queries)
    return ProbeReport(
        single_modality=single_modality(asking), paraphrases=paraphrases(asking), negation=negation(asking), leakage=leakage(asking)
    )
