"""How a modification text becomes `input_ids` and `attention_mask`."""

from __future__ import annotations

from .parsing import Contract


class TokenizerSpec(Contract, frozen=True):
    """`tokenizer.json` (Hugging Face tokenizers) with explicit truncation and padding to the batch's longest text.

    `max_length` counts special tokens. Padding is on the right, with `pad_id`.
    """

    file: str = "tokenizer.json"
    max_length: int = 32
    pad_token: str = "[PAD]"
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise ValueError(f"max_length must be at least 3 (two special tokens and a word), got {self.max_length}")
