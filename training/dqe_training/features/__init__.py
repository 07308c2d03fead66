"""The feature cache: image tokens of a frozen vision tower, computed once and read by training, mining and evaluation."""

from .blocks import image_token_blocks
from .store import FeatureStore, StoredTokens
from .writing import cached_tokens, fill

__all__ = ["FeatureStore", "StoredTokens", "cached_tokens", "fill", "image_token_blocks"]
