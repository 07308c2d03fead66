"""What probes found: figures that say in words what they count."""

from __future__ import annotations

import msgspec

from dqe_engine.contracts.parsing import Contract

from .metrics import PerQuery


class Figure(Contract, frozen=True):
    """A figure in [0, 1] over `queries` queries, with its 95 % bootstrap interval over them. NaN (null in JSON) where no query counts."""

    meaning: str
    value: float
    interval: tuple[float, float]
    queries: int

    @classmethod
    def of(cls, meaning: str, figure: PerQuery) -> Figure:
        return cls(meaning=meaning, value=figure.value, interval=figure.interval(), queries=figure.queries)


class Probe(Contract, frozen=True):
    """One probe. `how`: what was asked, in words. `skipped`: why there are no figures. `by_attribute`: attribute, then figure."""

    how: str = ""
    figures: dict[str, Figure] = msgspec.field(default_factory=dict)
    by_attribute: dict[str, dict[str, Figure]] = msgspec.field(default_factory=dict)
    skipped: str = ""


class ProbeReport(Contract, frozen=True):
    """The probes of one query set."""

    single_modality: Probe
    paraphrases: Probe
    negation: Probe
    leakage: Probe
