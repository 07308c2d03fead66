"""The DQE-CIR model."""

from .dqe import DQEModel, QueryOutput, paired_score, score

__all__ = ["DQEModel", "QueryOutput", "paired_score", "score"]
