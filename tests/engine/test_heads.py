"""Attribute heads alone: they take the place of a bundle's, and of nothing else; whatever does not fit leaves the bundle as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.tiny_bundle import SIZES, VOCABULARY, build_tiny_heads

from dqe_engine import heads as heads_module
from dqe_engine.bundle import Bundle, build_file_entries
from dqe_engine.cli.heads import main
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS
from dqe_engine.contracts.manifest import HEADS_FILE, OLDEST_SCHEMA, SCHEMA_VERSION, BundleManifest
from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BundleError, DQEError, InputError
from dqe_engine.heads import load_heads, replace_heads
from dqe_engine.query import Query

OTHERS = AttributeVocabulary(attributes=tuple(Attribute(name=name) for name in ("colour", "pattern", "sleeves")))


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle_path, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    return build_tiny_heads(tmp_path / "heads")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_only_the_heads_change(bundle: Path, heads: Path, tmp_path: Path) -> None:
    (bundle / "tensorrt" / "sm90-10.16").mkdir(parents=True)
    (bundle / "tensorrt" / "sm90-10.16" / "vision_encoder.engine").write_bytes(b"plan")
    (bundle / "notes.txt").write_text("mine")
    before, old = contents(bundle), Bundle.load(bundle)
    manifest = replace_heads(bundle, heads)
    after, new = contents(bundle), Bundle.load(bundle)
    assert {name for name in before if before[name] != after.get(name)} == {"manifest.json", ATTRIBUTE_HEADS.file}
    assert after[ATTRIBUTE_HEADS.file] == (heads / ATTRIBUTE_HEADS.file).read_bytes()
    assert new.manifest == manifest
    assert manifest.zones == load_heads(heads).zones != old.manifest.zones
    assert {p.graph for p in manifest.parity} == {spec.name for spec in GRAPHS}  # the composed query was not measured anew
    assert {entry.path for entry in manifest.files} == {"tokenizer.json", *(spec.file for spec in GRAPHS)}  # no engine, as before
    (bundle / "tensorrt" / "sm90-10.16" / "vision_encoder.engine").write_bytes(b"built again")
    assert Bundle.load(bundle).manifest == manifest
    assert (bundle / "notes.txt").read_text() == "mine"
    assert new.model_hash == old.model_hash  # so indexes stay valid
    assert {spec.name for spec in GRAPHS if manifest.graph_hash(spec) != old.manifest.graph_hash(spec)} == {ATTRIBUTE_HEADS.name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "heads"]


def test_answers_change_and_the_index_stays(bundle: Path, heads: Path, image_folder: Path, tmp_path: Path) -> None:
    old = RetrievalEngine.load(bundle, provider="cpu", threads=1)
    old.index_images(image_folder)
    old.save_index(tmp_path / "index")
    before = old.encode_queries([Query(reference_id="00.png", text="in red")])
    replace_heads(bundle, heads)
    new = RetrievalEngine.load(bundle, provider="cpu", threads=1)
    new.load_index(tmp_path / "index")
    after = new.encode_queries([Query(reference_id="00.png", text="in red")])
    assert np.abs(before.queries - after.queries).max() > 1e-3
    assert np.abs(before.predicted_weights - after.predicted_weights).max() > 1e-3


def test_another_vocabulary_has_to_be_allowed(bundle: Path, image_folder: Path, tmp_path: Path) -> None:
    others = build_tiny_heads(tmp_path / "others", vocabulary=OTHERS)
    before = contents(bundle)
    with pytest.raises(
        InputError, match=r"its attributes are colour, pattern, sleeves, those of .*bundle colour, shape; .* --new-vocabulary"
    ):
        replace_heads(bundle, others)
    assert contents(bundle) == before
    assert replace_heads(bundle, others, new_vocabulary=True).vocabulary == OTHERS
    engine = RetrievalEngine.load(bundle, provider="cpu", threads=1)
    assert engine.bundle.sizes == msgspec.structs.replace(SIZES, attributes=3)
    engine.index_images(image_folder)
    assert list(engine.search(Query(reference_id="00.png", text="in red", weights={"pattern": 2.0})).weights) == list(OTHERS.names)


def test_the_same_names_with_other_words_are_the_same_vocabulary_to_callers(bundle: Path, tmp_path: Path) -> None:
    worded = AttributeVocabulary(attributes=tuple(msgspec.structs.replace(a, words=("other",)) for a in VOCABULARY.attributes))
    assert worded.hash != VOCABULARY.hash
    assert replace_heads(bundle, build_tiny_heads(tmp_path / "worded", vocabulary=worded)).vocabulary == worded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_hash": "f" * 64}, r"trained on another encoder than that of .*bundle \(ffffffffffff, it has eeeeeeeeeeee\)"),
        ({"precision": "int8"}, "in int8, .*bundle is in float32"),
        ({"sizes": msgspec.structs.replace(SIZES, hidden_size=9)}, "the model has other sizes"),
        ({"vocabulary_hash": "0" * 64}, "the vocabulary is not the one that the heads were exported with"),
        ({"sizes": msgspec.structs.replace(SIZES, attributes=3)}, "3 attribute heads, but 2 attributes in the vocabulary"),
        ({"files": ()}, r"lists no files, expected attribute_heads\.onnx"),
        ({"schema_version": 2}, f"schema_version must be {OLDEST_SCHEMA} to {SCHEMA_VERSION}, got 2"),
        ({"schema_version": SCHEMA_VERSION + 1}, f"schema version {SCHEMA_VERSION + 1} is newer than the supported {SCHEMA_VERSION}"),
    ],
)
def test_heads_that_do_not_fit(bundle: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = contents(bundle)
    with pytest.raises(DQEError, match=message) as caught:
        replace_heads(bundle, build_tiny_heads(tmp_path / "bad", **changes))
    assert "\n" not in str(caught.value)
    assert contents(bundle) == before


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another byte": (lambda heads: _flip(heads / ATTRIBUTE_HEADS.file), "its bytes changed since export"),
    "cut short": (lambda heads: (heads / ATTRIBUTE_HEADS.file).write_bytes(b"x"), "1 bytes, the manifest says"),
    "no graph": (lambda heads: (heads / ATTRIBUTE_HEADS.file).unlink(), "missing from the bundle"),
    "no manifest": (lambda heads: (heads / HEADS_FILE).unlink(), r"no attribute heads here .* dqe-export --heads-only"),
    "no JSON": (lambda heads: (heads / HEADS_FILE).write_text("{"), "not valid JSON"),
    "a file of the encoder": (
        lambda heads: (heads / HEADS_FILE).write_text(
            (heads / HEADS_FILE).read_text().replace("attribute_heads.onnx", "query_encoder.onnx")
        ),
        r"lists query_encoder\.onnx, expected attribute_heads\.onnx",
    ),
}


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_heads(bundle: Path, heads: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    before = contents(bundle)
    damage(heads)
    with pytest.raises(BundleError, match=message):
        replace_heads(bundle, heads)
    assert contents(bundle) == before


def test_another_graph_under_the_heads_name(bundle: Path, tmp_path: Path) -> None:
    """Rightly hashed, but it is not what the engine binds."""
    heads = build_tiny_heads(tmp_path / "heads")
    shutil.copy(bundle / "target_encoder.onnx", heads / ATTRIBUTE_HEADS.file)
    entry = msgspec.json.decode((heads / HEADS_FILE).read_bytes())
    entry["files"] = msgspec.to_builtins([f for f in build_file_entries(heads) if f.path != HEADS_FILE])
    (heads / HEADS_FILE).write_bytes(msgspec.json.encode(entry))
    before = contents(bundle)
    with pytest.raises(BundleError, match="inputs are image_tokens"):
        replace_heads(bundle, heads)
    assert contents(bundle) == before


def test_what_stops_it_leaves_the_old_heads(bundle: Path, heads: Path, tmp_path: Path) -> None:
    before = contents(bundle)

    def stop(path: Path, manifest: BundleManifest) -> BundleManifest:
        assert Bundle.load(path).manifest == manifest  # whole already
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_heads(bundle, heads, check=stop)
    assert contents(bundle) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "heads"]


def test_a_disk_without_links(bundle: Path, heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(heads_module.os, "link", refuse)
    replace_heads(bundle, heads)
    Bundle.load(bundle)


def test_the_command(bundle: Path, heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle), str(heads)]) == 0
    assert capsys.readouterr().out.strip().endswith("bundle  colour, shape")
    assert main([str(bundle), str(bundle)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(heads), str(heads)]) == 2
    assert "no bundle here" in capsys.readouterr().err
