"""What an index must answer, by the definition."""

from __future__ import annotations

import numpy as np

from dqe_engine.index import IndexMatches


def ranking(rows: dict[str, np.ndarray], query: np.ndarray) -> list[tuple[str, float]]:
    """The definition: MaxSim, best first, ties to the older item."""
    scored = [(id, float((row.astype(np.float32) @ query).max())) for id, row in rows.items()]
    return sorted(scored, key=lambda pair: -pair[1])


def assert_ranked(found: IndexMatches, expected: list[tuple[str, float]]) -> None:
    assert [match.id for match in found.matches] == [id for id, _ in expected]
    np.testing.assert_allclose([match.score for match in found.matches], [score for _, score in expected], rtol=0, atol=1e-6)
