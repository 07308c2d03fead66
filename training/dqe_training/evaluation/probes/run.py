"""All probes of one ranked query set."""

from __future__ import annotations

from dqe_engine.errors import InputError

from .asking import Asking
from .leakage import leakage
from .negation import negation
from .paraphrases import paraphrases
from .report import ProbeReport
from .single_modality import single_modality


def run_probes(asking: Asking) -> ProbeReport:
    """Raises InputError where the targets are secret."""
    if asking.queries.secret:
        raise InputError(f"{asking.queries.name}: its targets are secret; probes need them")
    return ProbeReport(
        single_modality=single_modality(asking), paraphrases=paraphrases(asking), negation=negation(asking), leakage=leakage(asking)
    )
