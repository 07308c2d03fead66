from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_bundle import build_tokenizer

from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.errors import BundleError, InputError
from dqe_engine.text import TextEncoder

SPEC = TokenizerSpec(max_length=16)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer().save(str(path))
    return TextEncoder(path, SPEC)


def test_ids_masks_and_padding_on_the_right(encoder: TextEncoder) -> None:
    vocabulary = build_tokenizer().get_vocab()
    encoded = encoder.encode(["in red", "the same but round"])
    expected = [["[CLS]", "in", "red", "[SEP]", "[PAD]", "[PAD]"], ["[CLS]", "the", "same", "but", "round", "[SEP]"]]
    assert encoded.input_ids.tolist() == [[vocabulary[token] for token in row] for row in expected]
    assert encoded.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert encoded.input_ids.dtype == encoded.attention_mask.dtype == np.int64
    assert encoded.truncated == (False, False)


def test_a_text_does_not_depend_on_its_batch(encoder: TextEncoder) -> None:
    alone = encoder.encode(["in red"])
    together = encoder.encode(["in red", "red " * 10])
    assert together.input_ids[0, :4].tolist() == alone.input_ids[0].tolist()


def test_long_texts_are_truncated_and_say_so(encoder: TextEncoder) -> None:
    encoded = encoder.encode(["red " * 10_000, "red " * 14, "red " * 15])
    assert encoded.input_ids.shape == (3, 16)
    assert encoded.truncated == (True, False, True)
    assert encoded.input_ids[0, -1] == 3  # [SEP] survives


@pytest.mark.parametrize(
    ("texts", "lengths", "padded"),
    [
        (["in red"], (), 4),
        (["in red"], (8, 16), 8),
        (["in red", "the same but with red"], (4, 7, 8), 7),
        (["in red"], (4, 8), 4),
        (["red " * 30], (4, 8), 16),  # longer than any: as it is
    ],
)
def test_texts_are_padded_to_the_next_length(encoder: TextEncoder, texts: list[str], lengths: tuple[int, ...], padded: int) -> None:
    plain, encoded = encoder.encode(texts), encoder.encode(texts, lengths=lengths)
    assert encoded.input_ids.shape == encoded.attention_mask.shape == (len(texts), padded)
    longest = plain.input_ids.shape[1]
    np.testing.assert_array_equal(encoded.input_ids[:, :longest], plain.input_ids)
    np.testing.assert_array_equal(encoded.attention_mask[:, :longest], plain.attention_mask)
    assert (encoded.input_ids[:, longest:] == SPEC.pad_id).all()
    assert (encoded.attention_mask[:, longest:] == 0).all()
    assert encoded.truncated == plain.truncated
    assert encoded.input_ids.dtype == encoded.attention_mask.dtype == np.int64


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u00a0\u3000", "\0", "\u200b"])
def test_texts_without_words_are_refused(encoder: TextEncoder, text: str) -> None:
    with pytest.raises(InputError, match="no words"):
        encoder.encode(["red", text])


@pytest.mark.parametrize("text", ["🙂", "plus court, en rouge", "赤い袖", "أحمر", "red\0blue", "\ud83d red", "blue \udc80", "\ud83d\ude42"])
def test_any_unicode_is_accepted(encoder: TextEncoder, text: str) -> None:
    assert encoder.encode([text]).input_ids.shape[1] >= 3


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=40))
def test_no_text_crashes(encoder: TextEncoder, text: str) -> None:
    with contextlib.suppress(InputError):
        assert encoder.encode([text]).input_ids.shape[0] == 1


@pytest.mark.parametrize("texts", ["red", [None], [b"red"], [1]])
def test_only_sequences_of_str(encoder: TextEncoder, texts: object) -> None:
    with pytest.raises(InputError, match=r"expected a sequence|must be a str"):
        encoder.encode(texts)


def test_empty_batch(encoder: TextEncoder) -> None:
    encoded = encoder.encode([], lengths=(8,))
    assert encoded.input_ids.shape == encoded.attention_mask.shape == (0, 2)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match="not a tokenizer file"):
        TextEncoder(path, SPEC)
    build_tokenizer().save(str(path))
    with pytest.raises(BundleError, match=r"'\[PAD\]' has id 0, the manifest says 7"):
        TextEncoder(path, TokenizerSpec(pad_id=7))
