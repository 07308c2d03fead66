"""The feature cache: image tokens of a frozen vision tower, computed once and read by training, mining and evaluation."""

from .fill import cached_tokens, fill
from .store import FeatureStore, StoredTokens

__all__ = ["FeatureStore", "StoredTokens", "cached_tokens", "fill"]
