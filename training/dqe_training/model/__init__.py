"""The DQE-CIR model."""

from .dqe import DQEModel, QueryOutput, paired_score, require_attributes, score

__all__ = ["DQEModel", "QueryOutput", "paired_score", "require_attributes", "score"]
