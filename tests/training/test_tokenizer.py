"""The tokenizer and the batches of ids that it makes; all of FashionIQ's captions through the text path."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_training import make_model, model_config, query_inputs
from tokenizers import Tokenizer

from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.errors import InputError
from dqe_engine.text import TextEncoder
from dqe_training.data.records import TripletRecord, check_texts
from dqe_training.data.triplets import TextBatcher
from dqe_training.tokenizer import SPECIAL_TOKENS, build_tokenizer

TEXTS = ("is red", "make it a dress instead", "has stripes and is longer")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return build_tokenizer(TEXTS)


def test_special_tokens_come_first_and_frame_the_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(4)] == list(SPECIAL_TOKENS)
    assert tokenizer.encode("is red").tokens == ["[CLS]", "is", "red", "[SEP]"]


def test_case_and_accents_are_folded(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Is RÉD").ids == tokenizer.encode("is red").ids


def test_unseen_ascii_decomposes_without_unknowns(tokenizer: Tokenizer) -> None:
    unknown = tokenizer.token_to_id("[UNK]")
    rng = np.random.default_rng(0)
    printable = [c for c in string.printable if not c.isspace()]
    texts = [string.printable, "Zyzzyva-v2 (x9)", *("".join(rng.choice(printable, 12)) for _ in range(300))]
    for text in texts:
        encoding = tokenizer.encode(text)
        assert unknown not in encoding.ids, text
        assert len(encoding.ids) > 2
    assert tokenizer.encode("stripesred").tokens[1:-1] != tokenizer.encode("is red").tokens[1:-1]


@pytest.mark.parametrize("text", ["🙂", "变成红色", "in красный", "\u200b", "a" * 10_000, "red " * 10_000, "\0", "é\u0301"])
def test_any_text_encodes_within_the_limit(tokenizer: Tokenizer, text: str) -> None:
    ids, mask = TextBatcher(tokenizer, [text, "is red"], max_length=32, captions="plain")(torch.arange(2))
    assert ids.shape == mask.shape
    assert 4 <= ids.shape[1] <= 32
    assert (ids < tokenizer.get_vocab_size()).all()
    assert torch.isfinite(make_model().encode_query(query_inputs(make_model(), 2, 3)[0], ids, mask).query).all()


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert build_tokenizer(TEXTS).to_str() == build_tokenizer(TEXTS).to_str()


def test_batches_are_padded_to_their_own_longest_text(tokenizer: Tokenizer) -> None:
    batcher = TextBatcher(tokenizer, TEXTS, max_length=32, captions="plain")
    ids, mask = batcher(torch.tensor([1, 0]))
    encodings = [tokenizer.encode(TEXTS[i]).ids for i in (1, 0)]
    assert ids.shape[1] == len(encodings[0])
    for row, expected in enumerate(encodings):
        assert ids[row][mask[row].bool()].tolist() == expected
        assert (ids[row][~mask[row].bool()] == 0).all()
    assert batcher(torch.tensor([0]))[0].shape == (1, 4)


def test_ids_are_those_of_the_runtime(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [*TEXTS, "is red 🙂 and " + "very " * 40 + "long", "Größer"]
    ids, mask = TextBatcher(tokenizer, texts, max_length=12, captions="plain")(torch.arange(len(texts)))
    tokenizer.no_truncation()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoded = TextEncoder(tmp_path / "tokenizer.json", TokenizerSpec(max_length=12)).encode(texts)
    np.testing.assert_array_equal(ids.numpy(), encoded.input_ids)
    np.testing.assert_array_equal(mask.numpy(), encoded.attention_mask)


@pytest.mark.realdata
def test_all_fashioniq_captions_pass_the_text_path(realdata: Path) -> None:
    """Both captions of every train triplet: those with words tokenise and encode to finite queries, the others are errors."""
    texts, refused = [], []
    for category, triplets in (("dress", 5985), ("shirt", 5988), ("toptee", 6027)):
        records = json.loads((realdata / "fashioniq" / "captions" / f"cap.{category}.train.json").read_text())
        assert len(records) == triplets
        for record in records:
            for caption in record["captions"]:
                try:
                    check_texts([TripletRecord(reference=record["candidate"], target=record["target"], text=caption)], where=category)
                    texts.append(caption)
                except InputError as error:
                    refused.append((caption.strip(), str(error)))
    assert refused == [("", "toptee, record 1: empty text; remove the triplet or write what changes")] * 12
    tokenizer = build_tokenizer(texts)
    unknown = tokenizer.token_to_id("[UNK]")
    batcher = TextBatcher(tokenizer, texts, max_length=32, captions="plain")
    model = make_model(model_config(hidden_size=8, embedding_dim=4), vocab_size=tokenizer.get_vocab_size())
    image = query_inputs(model, 1, 2)[0]
    with torch.inference_mode():
        for rows in torch.arange(len(texts)).split(1024):
            ids, mask = batcher(rows)
            assert (mask.sum(dim=1) > 2).all(), "a caption without a token"
            output = model.encode_query(image.expand(len(rows), -1, -1), ids, mask)
            for value in output:
                assert torch.isfinite(value).all()
            ascii_rows = torch.tensor([texts[row].isascii() for row in rows.tolist()])
            assert not (ids[ascii_rows] == unknown).any()
