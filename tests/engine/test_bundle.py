from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bundle import SIZES, build_tiny_bundle, build_tiny_heads

from dqe_engine.bundle import Bundle, build_file_entries
from dqe_engine.contracts.manifest import OLDEST_SCHEMA, REPORT_FILES, SCHEMA_VERSION
from dqe_engine.doctor import bundle_graphs
from dqe_engine.doctor.findings import Context, Finding
from dqe_engine.errors import BundleError, IndexFormatError
from dqe_engine.heads import load_heads
from dqe_engine.index import GalleryIndex
from dqe_engine.tensorrt.engines import read_sidecar


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(bundle_path, tmp_path / "copy"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(path: Path, message: str, **options: bool) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(path, **options)
    assert "\n" not in str(caught.value)


def test_loads(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    assert loaded.sizes == SIZES
    assert loaded.vocabulary.names == ("colour", "shape")
    assert len(loaded.model_hash) == 32


def test_the_hash_follows_the_weights(bundle: Path, tmp_path: Path) -> None:
    again, other = build_tiny_bundle(tmp_path / "again"), build_tiny_bundle(tmp_path / "other", seed=1)
    assert Bundle.load(again).model_hash == Bundle.load(bundle).model_hash
    assert Bundle.load(other).model_hash != Bundle.load(bundle).model_hash


@pytest.mark.parametrize("name", ["vision_encoder.onnx", "query_encoder.onnx", "target_encoder.onnx", "tokenizer.json"])
def test_a_changed_byte_or_a_missing_or_cut_file(bundle: Path, name: str) -> None:
    file = bundle / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(bundle, "its bytes changed")
    assert Bundle.load(bundle, verify=False).path == bundle
    file.write_bytes(data[:-1])
    refused(bundle, "bytes, the manifest says", verify=False)
    file.unlink()
    refused(bundle, "missing from the bundle", verify=False)


@pytest.mark.parametrize("listed", [False, True], ids=["as exported", "as older exports listed it"])
def test_the_report_is_no_part_of_the_bundle(bundle: Path, listed: bool) -> None:
    """It may be edited or deleted: the bundle loads, is the same and current, and the doctor finds nothing."""
    model_hash = Bundle.load(bundle).model_hash
    for name in REPORT_FILES:
        (bundle / name).write_text("measured")
    assert not {entry.path for entry in build_file_entries(bundle)} & set(REPORT_FILES)
    if listed:
        entry = {"size": 8, "sha256": hashlib.sha256(b"measured").hexdigest()}
        edit(bundle, lambda manifest: manifest["files"].extend({"path": name, **entry} for name in REPORT_FILES))
    loaded = Bundle.load(bundle)
    for change in (lambda file: file.write_text("mEasured"), Path.unlink):
        for name in REPORT_FILES:
            change(bundle / name)
        assert loaded.is_current()
        assert Bundle.load(bundle).manifest == loaded.manifest
        assert Bundle.load(bundle).model_hash == model_hash
        findings = {found.name: found.status for found in bundle_graphs.probe(Context(bundle=str(bundle))) if isinstance(found, Finding)}
        assert findings["files"] == "ok"


def test_a_bundle_that_a_killed_replacement_moved_aside(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = bundle.parent / ".tmp-copy.abcdefgh"
    aside.mkdir()
    bundle.rename(aside / "old")
    with monkeypatch.context() as patch:

        def refuse(source: Path, target: Path) -> None:
            raise OSError(errno.EROFS, "Read-only file system", str(source))

        patch.setattr(os, "replace", refuse)
        refused(bundle, "the old bundle is at .*copy.abcdefgh/old .Read-only file system.; rename that to copy")
    assert Bundle.load(bundle).path == bundle
    assert (bundle / "manifest.json").is_file()


def test_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path, "no bundle here.*dqe-export")
    refused(tmp_path / "absent", "no bundle here")
    (tmp_path / "manifest.json").write_text("{")
    refused(tmp_path, "not valid JSON")
    (tmp_path / "manifest.json").write_text("[]")
    refused(tmp_path, "this is something else, not a bundle")


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.5])
def test_other_schemas(bundle: Path, version: object) -> None:
    edit(bundle, lambda manifest: manifest.update(schema_version=version))
    refused(bundle, f"schema_version must be {OLDEST_SCHEMA} to {SCHEMA_VERSION}")


def of_version_3(manifest: dict[str, Any], precision: str) -> None:
    """As that version wrote it: the report's files listed, and nothing of what was measured since."""
    manifest.update(schema_version=3, precision=precision)
    del manifest["target"], manifest["kind"]
    for name in ("mean_error", "norm", "batch_dependence"):
        del manifest["tolerance"][name]
    for graph in manifest["parity"]:
        del graph["batch_dependence"]
    manifest["files"] += [{"path": name, "size": 8, "sha256": "0" * 64} for name in REPORT_FILES]


def test_older_bundles_stay_what_they_were(bundle: Path) -> None:
    """But for 8 bits, whose scheme was another."""
    before = Bundle.load(bundle)
    edit(bundle, lambda manifest: of_version_3(manifest, "float32"))
    assert Bundle.load(bundle).model_hash == before.model_hash
    edit(bundle, lambda manifest: manifest.update(precision="int8"))
    refused(bundle, "int8 of schema version 3 is of a scheme whose answers depended on the processor and on the batch; export again")


def test_bundles_of_version_4_are_for_cpus(bundle: Path) -> None:
    def of_version_4(manifest: dict[str, Any]) -> None:
        manifest.update(schema_version=4, precision="int8")
        del manifest["target"], manifest["kind"]

    before = Bundle.load(bundle)
    edit(bundle, of_version_4)
    assert (Bundle.load(bundle).manifest.target, Bundle.load(bundle).model_hash) == ("cpu", before.model_hash)


def test_bundles_of_version_5_did_not_say_what_they_are(bundle: Path) -> None:
    before = Bundle.load(bundle)
    assert json.loads((bundle / "manifest.json").read_text())["kind"] == "bundle"
    edit(bundle, lambda manifest: (manifest.update(schema_version=5), manifest.pop("kind")))
    assert Bundle.load(bundle).model_hash == before.model_hash


def test_what_is_no_bundle_is_told_as_what_it_is(bundle: Path, tmp_path: Path) -> None:
    """Others' documents are neither broken bundles nor of newer schemas, whichever version wrote them."""
    index = tmp_path / "index"
    GalleryIndex.for_bundle(Bundle.load(bundle)).save(index)
    engines, heads = bundle / "tensorrt" / "sm90", build_tiny_heads(tmp_path / "heads")
    engines.mkdir(parents=True)
    (engines / "engines.json").write_text("{}")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "checkpoint.json").write_text("{}")
    refused(index, "this is an index, not a bundle; check the path")
    refused(heads, r"no bundle here \(manifest.json is missing, and this is attribute heads; dqe-heads puts them into a bundle\)")
    refused(engines, r"no bundle here \(manifest.json is missing, and this is a folder of TensorRT engines; the bundle is two folders up")
    refused(tmp_path / "checkpoint", "manifest.json is missing, and this is a training checkpoint; export it first")
    for load in (lambda: GalleryIndex.load(bundle), lambda: edit(bundle, lambda m: m.pop("kind")) or GalleryIndex.load(bundle)):
        with pytest.raises(IndexFormatError, match="this is a bundle, not an index; check the path"):
            load()
    (heads / "heads.json").write_text((index / "manifest.json").read_text())
    with pytest.raises(BundleError, match="this is an index, not attribute heads"):
        load_heads(heads)
    with pytest.raises(BundleError, match="this is something else, not a folder of TensorRT engines"):
        read_sidecar(engines)


def test_a_manifest_that_is_a_pipe_or_no_path(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    refused(bundle, "not a regular file")
    refused(Path("a\0b"), r"'a\\x00b.*not a path")


def test_a_newer_schema_is_named_even_with_unknown_keys(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(schema_version=SCHEMA_VERSION + 1, novelty=1))
    refused(bundle, f"schema version {SCHEMA_VERSION + 1} is newer than the supported {SCHEMA_VERSION}; upgrade")


def test_unknown_keys_and_wrong_types(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(novelty=1))
    refused(bundle, "unknown field `novelty`; valid keys")
    edit(bundle, lambda manifest: (manifest.pop("novelty"), manifest["sizes"].update(image_size="32")))
    refused(bundle, r"Expected `int`, got `str`.*sizes.image_size")


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "a/../../outside", "", "a\\b", "./tokenizer.json", "link", "a//b"])
def test_paths_that_leave_the_bundle(bundle: Path, path: str) -> None:
    outside = bundle.parent / "outside"
    outside.write_text("secret")
    (bundle / "link").symlink_to(outside)
    edit(bundle, lambda manifest: manifest["files"].append({"path": path, "size": 6, "sha256": "0" * 64}))
    refused(bundle, "outside the bundle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].append(m["files"][0]), "lists a file twice"),
        (lambda m: m["files"].pop(0), "not in the list of files"),
        (lambda m: m["graphs"].pop(0), "graph vision_encoder is missing; export the bundle again"),
        (lambda m: m["graphs"][0]["inputs"][0].update(name="pixels"), "graph vision_encoder has other inputs or outputs"),
        (lambda m: m["sizes"].update(attributes=3), "3 attribute heads, but 2 attributes"),
        (lambda m: m["sizes"].update(image_size=64), "graphs take images of 64 px"),
        (lambda m: m["sizes"].update(embedding_dim=0), "sizes must be at least 1"),
    ],
)
def test_contradictions(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(bundle, change)
    refused(bundle, message)


def test_file_entries(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "manifest.json").write_text("{}")
    entries = build_file_entries(tmp_path)
    assert [(entry.path, entry.size) for entry in entries] == [("a", 0), ("b/x", 3)]
    assert entries[1].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "c").symlink_to(tmp_path / "a")
    with pytest.raises(BundleError, match="a symbolic link, which a bundle cannot hold"):
        build_file_entries(tmp_path)
