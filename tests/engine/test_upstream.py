"""The runtime's pixels and token ids on odd images and texts: those that transformers' own processor and tokenizer gave, as stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.upstream_expectations import MAX_LENGTH, PIXELS, SIZE, TOKENS, images, our_tokenizer, upstream_pixels, upstream_tokens

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.preprocessing import preprocess
from dqe_engine.text import TextEncoder
from dqe_export.reading_samples import TEXTS


@pytest.mark.parametrize("name", images())
def test_pixels_are_upstreams(name: str) -> None:
    with np.load(PIXELS) as stored:
        np.testing.assert_allclose(preprocess([images()[name]], PreprocessingSpec(image_size=SIZE))[0], stored[name], rtol=0, atol=1e-6)


def test_token_ids_are_upstreams(tmp_path: Path) -> None:
    stored = json.loads(TOKENS.read_text())
    our_tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = TextEncoder(tmp_path / "tokenizer.json", TokenizerSpec(max_length=MAX_LENGTH)).encode(list(TEXTS.values()))
    for row, name in enumerate(TEXTS):
        assert found.input_ids[row].tolist() == stored["input_ids"][row], name
        assert found.attention_mask[row].tolist() == stored["attention_mask"][row], name
    assert found.truncated[list(TEXTS).index("over-long")]
    assert not found.truncated[list(TEXTS).index("one word")]


def test_what_is_stored_is_what_upstream_gives() -> None:
    assert json.loads(TOKENS.read_text()) == upstream_tokens()
    given = upstream_pixels()
    with np.load(PIXELS) as stored:
        assert set(stored) == set(given) == set(images())
        for name, values in given.items():
            np.testing.assert_allclose(stored[name], values, rtol=0, atol=1e-6, err_msg=name)
