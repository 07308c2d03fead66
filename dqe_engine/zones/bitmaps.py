"""Sets of item positions as bits: bit i % 64 of word i // 64 stands for item i. Bits behind the last item are 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
WORD = 64


def words_for(size: int) -> int:
    """Words of a bitmap of `size` items."""
    return -(-size // WORD)


def packed(flags: NDArray[np.bool_]) -> U64:
    """(..., N) flags as (..., W) words."""
    size = flags.shape[-1]
    room = np.zeros((*flags.shape[:-1], words_for(size) * 8), np.uint8)
    room[..., : -(-size // 8)] = np.packbits(flags, axis=-1, bitorder="little")
    words: U64 = room.view("<u8").astype(np.uint64, copy=False)
    return words


def unpacked(words: U64, size: int) -> NDArray[np.bool_]:
    """(..., W) words as (..., N) flags."""
    octets = np.ascontiguousarray(words).astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=size, bitorder="little").view(np.bool_)


def counted(words: U64) -> int:
    """How many bits of (W,) words are set."""
    return int.from_bytes(words.tobytes(), "little").bit_count()


def cut(words: U64, size: int) -> U64:
    """The first `size` bits of (..., W) words; a copy where something has to be cleared, read-only by agreement."""
    kept = words[..., : words_for(size)]
    unused = words_for(size) * WORD - size
    if unused and (kept[..., -1] >> np.uint64(WORD - unused)).any():
        kept = kept.copy()
        kept[..., -1] &= np.uint64((1 << (WORD - unused)) - 1)
    return kept
