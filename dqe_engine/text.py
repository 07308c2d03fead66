"""Modification texts to token ids: `tokenizer.json` with the truncation and padding that the bundle's spec states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .captions import blip_caption
from .contracts.tokenizer import TokenizerSpec
from .errors import BundleError, InputError


@dataclass(frozen=True)
class EncodedTexts:
    """`input_ids` and `attention_mask`: (B, L) int64; `truncated[b]`: whether text b lost words to `max_length`; `unknown_words[b]`:
    words of text b that the vocabulary lacks, all of which the model reads as the same one."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    truncated: tuple[bool, ...]
    unknown_words: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """One text: its token ids, special ones included, and as in `EncodedTexts`."""

    ids: tuple[int, ...]
    truncated: bool
    unknown_words: tuple[str, ...]


class TextEncoder:
    """Tokenises batches of texts. Immutable after construction, so threads may share it.

    Raises BundleError when the tokenizer file cannot be read or disagrees with the spec about the padding token.
    """

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        with _failures(path):
            tokenizer = Tokenizer.from_file(str(path))
        if (pad_id := tokenizer.token_to_id(spec.pad_token)) != spec.pad_id:
            raise BundleError(f"{path}: {spec.pad_token!r} has id {pad_id}, the manifest says {spec.pad_id}; export the bundle again")
        tokenizer.enable_truncation(spec.max_length)
        tokenizer.no_padding()
        with _failures(path):
            tokenizer.encode("a b")  # what contradicts itself in the file, such as a token that its template names and lacks
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
        self._tokenizer, self._path = tokenizer, path
        self.spec = spec

    def tokenise(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text, truncated to `max_length` (special tokens included).

        Any Unicode is accepted; lone surrogates become U+FFFD. Raises InputError for anything but a sequence of str,
        and for a text without a single token, such as an empty or blank one. A text of which the caption processor leaves
        nothing (".") is its special tokens alone, as the authors' models read it.
        """
        if isinstance(texts, str):
            raise InputError("expected a sequence of texts, got a single str; wrap it in a list")
        given = [_clean(text) for text in texts]
        cleaned = [blip_caption(text) for text in given] if self.spec.captions == "blip" else given
        with _failures(self._path):
            encodings = self._tokenizer.encode_batch(cleaned) if cleaned else []
        found = []
        for asked, text, encoding in zip(given, cleaned, encodings, strict=True):
            if all(encoding.special_tokens_mask) and (text or not asked.strip()):
                raise InputError(f"the modification text {text[:40]!r} has no words; say what should differ, such as 'in red'")
            unknown = [text[start:end] for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True) if id == self._unknown_id]
            found.append(Tokens(tuple(encoding.ids), bool(encoding.overflowing), tuple(dict.fromkeys(unknown))))
        return found

    def pad(self, ids: Sequence[Sequence[int]], *, lengths: Sequence[int] = ()) -> EncodedTexts:
        """Tokens of several texts side by side, padded to the longest, or to the next of `lengths` (ascending) where one is as long."""
        if not ids:
            return EncodedTexts(np.empty((0, 2), np.int64), np.empty((0, 2), np.int64), ())
        longest = max(map(len, ids))
        shape = len(ids), next((length for length in lengths if length >= longest), longest)
        padded, mask = np.full(shape, self.spec.pad_id, np.int64), np.zeros(shape, np.int64)  # (B, L)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return EncodedTexts(padded, mask, (False,) * len(ids), ((),) * len(ids))

    def encode(self, texts: Sequence[str], *, lengths: Sequence[int] = ()) -> EncodedTexts:
        """`tokenise` and `pad`."""
        tokens = self.tokenise(texts)
        padded = self.pad([one.ids for one in tokens], lengths=lengths)
        truncated, unknown = tuple(one.truncated for one in tokens), tuple(one.unknown_words for one in tokens)
        return EncodedTexts(padded.input_ids, padded.attention_mask, truncated, unknown)


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    """What `tokenizers` raises, bare Exception for every kind of bad file and a panic of Rust for some, is a BundleError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which cannot be imported
            raise
        raise BundleError(f"{path}: not a tokenizer file that `tokenizers` can read ({error}); copy it again") from error


def _clean(text: object) -> str:
    """A str that can be encoded as UTF-8: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    if not isinstance(text, str):
        raise InputError(f"the modification text must be a str, got {type(text).__name__}; a composed query needs an image and a text")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
