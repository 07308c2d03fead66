"""BLIP's caption processor to the letter, by hand-made cases, and its way through the runtime's text encoder and training's batches."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_bundle import build_tokenizer

from dqe_engine.captions import blip_caption
from dqe_engine.contracts.manifest import _digest
from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.errors import InputError
from dqe_engine.text import TextEncoder
from dqe_export.upstream_reading import _blip_caption

CASES = {
    "Is RED, with long sleeves.": "is red, with long sleeves",
    'the same (but) "bigger"!': "the same but bigger",
    "a*b#c:d;e~f": "a b c d e f",
    "v-neck & 50% off / it's, ok?": "v-neck & 50% off / it's, ok?",
    "one   two \t three": "one two three",
    "one\ttwo\nthree": "one\ttwo\nthree",
    "  two lines.\n": "two lines",
    "line\n": "line",
    "\nred": "\nred",
    "...": "",
    "ÉCLAIR": "éclair",
    " ".join(["w"] * 60): " ".join(["w"] * 50),
    " ".join(["a.b"] * 30): " ".join(["a b"] * 25),
}


@pytest.mark.parametrize("text", CASES, ids=lambda text: repr(text[:20]))
def test_a_caption(text: str) -> None:
    assert blip_caption(text) == CASES[text]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from('  \t\n.!"()*#:;~,AbÉ'), max_size=80))
def test_exports_own_reading_is_the_same(text: str) -> None:
    assert _blip_caption(text) == blip_caption(text)


def test_the_runtime_reads_captions_as_the_spec_says(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build_tokenizer().save(str(path))
    plain, blip = (TextEncoder(path, spec) for spec in (TokenizerSpec(max_length=16), TokenizerSpec(max_length=16, captions="blip")))
    assert blip.tokenise(["IN RED!"]) == plain.tokenise(["in red"])
    assert blip.tokenise(["IN RED!"]) != plain.tokenise(["IN RED!"])
    (wordless,) = blip.tokenise(["!!!"])  # CIRR's test split has a blank text, for which "." is read
    assert len(wordless.ids) == 2
    with pytest.raises(InputError, match="has no words"):
        blip.tokenise([" "])


def test_a_spec_without_captions_is_written_and_hashed_as_before() -> None:
    plain = TokenizerSpec()
    assert b"captions" not in to_json(plain)
    assert _digest((plain,)) != _digest((msgspec.structs.replace(plain, captions="blip"),))
    assert parse_json(TokenizerSpec, to_json(TokenizerSpec(captions="blip")), where="spec").captions == "blip"
    with pytest.raises(InputError, match="valid values: blip"):
        parse_json(TokenizerSpec, b'{"captions": "clip"}', where="spec")
