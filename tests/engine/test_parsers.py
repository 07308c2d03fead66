"""What strangers and damaged disks hand to parsers: one line that says what is wrong, or success; never a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fuzzing import Fuzzing
from support.mining_workers import job
from support.parsers import check_line
from support.tiny_bundle import build_tokenizer

from dqe_engine.array_files import open_array
from dqe_engine.contracts.parsing import parse_json
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import BackendError, BundleError, DQEError, InputError
from dqe_engine.text import TextEncoder
from dqe_engine.zones.mining_folder import mine_to_folder


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory: pytest.TempPathFactory) -> Fuzzing:
    return Fuzzing(tmp_path_factory.mktemp("fuzzing"))


def test_good_inputs_are_good(fuzzing: Fuzzing) -> None:
    for name, (good, parser) in fuzzing.parsers.items():
        if name != "engines.json":  # whose plan has another SHA-256
            parser(good)


def test_mutated_inputs(fuzzing: Fuzzing) -> None:
    """`python -m support.fuzzing` goes on for longer."""
    rng = random.Random(int(os.environ.get("DQE_FUZZ_SEED", "0")))
    for _ in range(int(os.environ.get("DQE_FUZZ_INPUTS", "2000"))):
        fuzzing.any(rng)
    assert not fuzzing.problems


@pytest.mark.parametrize(
    "name", ["index manifest", "bundle manifest", "heads", "engines.json", "vocabulary", "traffic", "mined.json", "run.json"]
)
@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a\\nb": 1}', b'{"\\u001b[2J": 1}', b"\xff\xfe\x00"])
def test_no_document(fuzzing: Fuzzing, name: str, data: bytes) -> None:
    with pytest.raises(DQEError) as caught:
        fuzzing.parsers[name][1](data)
    check_line(caught.value)
    assert str(caught.value).isprintable()


def index_with(fuzzing: Fuzzing, **changes: Any) -> bytes:
    return json.dumps(json.loads(fuzzing.parsers["index manifest"][0]) | changes).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_shape": [2**63, 4]}, "rows of"),
        ({"target_shape": [2**40, 2**40], "rows": 0}, "rows of"),
        ({"catalogue": {"name": "00000000.catalogue", "size": 2**61, "crc32": 0}}, "missing"),
    ],
)
def test_sizes_beyond_any_memory(fuzzing: Fuzzing, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DQEError, match=message):
        fuzzing.parsers["index manifest"][1](index_with(fuzzing, **changes))


def test_a_catalogue_that_is_said_to_be_larger_than_it_is(fuzzing: Fuzzing) -> None:
    good = json.loads(fuzzing.parsers["index manifest"][0])
    with pytest.raises(DQEError, match="checksum differs"):
        fuzzing.parsers["index manifest"][1](index_with(fuzzing, catalogue=good["catalogue"] | {"size": 2**61}))


def test_phrases_without_a_word_name_nothing() -> None:
    data = b'{"attributes": [{"name": "colour", "values": ["\xe2\x80\xa6", "red"], "words": ["\\u0000", "hue"]}]}'
    vocabulary = parse_json(AttributeVocabulary, data, where="vocabulary.json")
    assert vocabulary.named_in("a red one") == (True,)
    assert vocabulary.named_in("a dark one \u2026") == (False,)


def test_a_tokenizer_that_contradicts_itself(tmp_path: Path) -> None:
    document = json.loads(build_tokenizer().to_str())
    document["post_processor"]["special_tokens"] = {"[CLS]": document["post_processor"]["special_tokens"]["[CLS]"]}
    document["post_processor"]["single"][-1] = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="not a tokenizer file that `tokenizers` can read"):
        TextEncoder(tmp_path / "tokenizer.json", TokenizerSpec())


def test_texts_longer_than_any_model_takes() -> None:
    with pytest.raises(InputError, match="max_length must be 3"):
        parse_json(TokenizerSpec, b'{"max_length": 18446744073709551616}', where="spec.json")


@pytest.mark.parametrize(
    "header",
    [b"{'descr': '<i8', 'fortran_order': False, 'shape': (23, 5", b"{b'descr': 1, 'shape': 2}", b"1 +", b"[" * 90, b"{'descr': '<i8'}"],
)
def test_array_files_with_odd_headers(tmp_path: Path, header: bytes) -> None:
    """NumPy lets Python's tokenizer and parser read the header."""
    np.save(tmp_path / "a.npy", np.zeros((23, 5)))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:10] + header.ljust(117) + b"\n" + whole[128:])
    with pytest.raises(InputError, match="not a whole"):
        open_array(tmp_path / "a.npy")


def test_mined_files_are_those_of_mined_negatives(fuzzing: Fuzzing) -> None:
    good, parser = fuzzing.parsers["mined.json"]
    document = json.loads(good)
    for path in ("../../etc/passwd", "x" * 5000, "picks.npy", "a\nb"):
        document["files"][0]["path"] = path
        with pytest.raises(InputError, match="lists other files"):
            parser(json.dumps(document).encode())


def test_more_picks_than_a_record_can_have(fuzzing: Fuzzing) -> None:
    good, parser = fuzzing.parsers["mined.json"]
    document = json.loads(good)
    document["plan"]["picks"] = 2**32
    with pytest.raises(InputError, match=r"mined\.json: 4294967296 picks per query, expected 0 to 16777216"):
        parser(json.dumps(document).encode())
    with pytest.raises(InputError, match="picks per query"):
        mine_to_folder(Path("nowhere"), dataclasses.replace(job(), picks=2**32))
    assert not Path("nowhere.partial").exists()


@pytest.mark.parametrize(("name", "message"), [("x" * 5000, "ile name too long"), ("a\0b", "not a plain file name"), ("none", "missing")])
def test_engine_files_with_odd_names(fuzzing: Fuzzing, name: str, message: str) -> None:
    good, parser = fuzzing.parsers["engines.json"]
    document = json.loads(good)
    document["engines"][0]["file"]["path"] = name
    with pytest.raises(BundleError, match=message):
        parser(json.dumps(document).encode())


def test_messages_are_one_printable_line() -> None:
    error = BackendError("a\nb\x1b[31m\ud800 größe 👩‍🦰 c:\\n")
    assert str(error) == "a\\nb\\x1b[31m\\ud800 größe 👩‍🦰 c:\\n"
    assert isinstance(InputError("x"), ValueError)
    with pytest.raises(DQEError, match=r"zones\.json: Object contains unknown field `a\\nb`"):
        parse_json(ZoneSpec, b'{"lo": 0, "hi": 1, "a\\nb": 1}', where="zones.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": [[]]}, "exclude: ids are str, got list"),
        ({"unlike": [{}]}, "unlike: ids are str, got dict"),
        ({"absolute_weights": {"shape": 1e39}}, "weight of .shape.: expected a number from 0 to 3.4e.38, got 1e.39"),
    ],
)
def test_odd_queries(fuzzing: Fuzzing, changes: dict[str, Any], message: str) -> None:
    good, parser = fuzzing.parsers["query"]
    with pytest.raises(InputError, match=message):
        parser(json.dumps(json.loads(good) | changes).encode())
