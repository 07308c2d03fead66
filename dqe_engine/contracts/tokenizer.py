"""How a modification text becomes `input_ids` and `attention_mask`."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from .parsing import Contract

MOST_TOKENS = 1 << 20
"""Of a text: more than any model takes."""


class TokenizerSpec(Contract, frozen=True):
    """`tokenizer.json` (Hugging Face tokenizers) with explicit truncation and padding to the batch's longest text.

    `max_length` counts special tokens. Padding is on the right, with `pad_id`. `captions` "blip": texts go through BLIP's caption
    processor first (`dqe_engine.captions`). A spec without it is written without it, as before there was such a field: the hash of its
    model is the same.
    """

    file: str = "tokenizer.json"
    max_length: int = 32
    pad_token: str = "[PAD]"
    pad_id: int = 0
    captions: Literal["blip"] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if not 3 <= self.max_length <= MOST_TOKENS:
            raise ValueError(f"max_length must be 3 (two special tokens and a word) to {MOST_TOKENS}, got {self.max_length}")
