"""The index on disk: what a save confirmed is there after any kill, and damage is told from data."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.samples import image_rows, query_rows, target_rows

from dqe_engine.errors import IndexConflictError, IndexFormatError
from dqe_engine.index import GalleryIndex
from dqe_engine.index import storage as disk
from dqe_engine.index.repair import RepairReport
from dqe_engine.index.writer import Writer

MakeIndex = Callable[..., GalleryIndex]


def data_files(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()} - {"manifest.json", "lock"}


@pytest.mark.parametrize("options", [{}, {"storage": "f16", "image_storage": "f16"}, {"image_storage": "f32"}])
def test_round_trip(make_index: MakeIndex, tmp_path: Path, options: dict[str, str]) -> None:
    index, path = make_index(19, **options), tmp_path / "deep" / "index"
    before = index.search(query_rows(3), 19)
    index.save(path)
    loaded = GalleryIndex.load(path, model_hash="m" * 32, verify=True)
    assert loaded.ids == index.ids
    assert loaded.search(query_rows(3), 19) == index.search(query_rows(3), 19) == before
    assert (loaded.storage, loaded.image_storage) == (index.storage, index.image_storage)
    if loaded.image_storage != "none":
        np.testing.assert_array_equal(loaded.image_tokens("i7"), index.image_tokens("i7"))


def test_metadata_and_odd_ids_survive(make_index: MakeIndex, tmp_path: Path) -> None:
    index, path = make_index(), tmp_path / "index"
    ids, metadata = ["a/b c.png", "größe\n", "🙂", "\0"], [{"price": 1.5, "tags": ["x", None]}, None, {}, {"n": 2**70}]
    index.add(ids, target_rows(4), metadata=metadata)
    index.save(path)
    found = GalleryIndex.load(path).search(query_rows(1), 4)[0].matches
    assert {match.id: match.metadata for match in found} == dict(zip(ids, metadata, strict=True))


def test_an_empty_index(make_index: MakeIndex, tmp_path: Path) -> None:
    make_index(image_storage="f16").save(tmp_path / "index")
    loaded = GalleryIndex.load(tmp_path / "index", verify=True)
    assert len(loaded) == 0
    assert loaded.search(query_rows(1), 3)[0].matches == ()


def test_saving_again_appends_what_is_new(make_index: MakeIndex, tmp_path: Path) -> None:
    index, path = make_index(10), tmp_path / "index"
    index.save(path)
    files = {name: (path / name).read_bytes() for name in data_files(path)}
    index.add(["new"], target_rows(1, 5))
    index.remove(["i3"])
    index.save(path)
    for name, before in files.items():
        now = (path / name).read_bytes()
        assert now.startswith(before)
        assert len(now) > len(before)
    assert data_files(path) == set(files)
    assert GalleryIndex.load(path, verify=True).ids == index.ids


def test_saving_nothing_new_writes_nothing(make_index: MakeIndex, tmp_path: Path) -> None:
    index, path = make_index(3), tmp_path / "index"
    index.save(path)
    before = (path / "manifest.json").stat().st_mtime_ns
    index.save(path)
    assert (path / "manifest.json").stat().st_mtime_ns == before


def test_compaction_and_collection_of_orphans(make_index: MakeIndex, tmp_path: Path) -> None:
    index, path = make_index(10, image_storage="f32"), tmp_path / "index"
    index.save(path)
    first = data_files(path)
    expected = index.image_tokens("i9")
    index.remove([f"i{n}" for n in range(6)])
    index.save(path)
    assert data_files(path) > first, "a reader that has just read the old manifest still finds its files"
    (path / ".tmp-left-by-a-kill").write_bytes(b"x")
    (path / "readme.txt").write_text("not ours")
    index.add(["new"], target_rows(1), np.zeros((1, 3, 5), np.float32))
    index.save(path)
    assert data_files(path).isdisjoint(first)
    assert data_files(path) & {".tmp-left-by-a-kill", "readme.txt"} == {"readme.txt"}
    loaded = GalleryIndex.load(path, verify=True)
    assert loaded.ids == ("i6", "i7", "i8", "i9", "new")
    assert disk.read_manifest(path).rows == 5
    np.testing.assert_array_equal(loaded.image_tokens("i9"), expected)


def test_two_writers(make_index: MakeIndex, tmp_path: Path) -> None:
    path = tmp_path / "index"
    make_index(3).save(path)
    first, second = GalleryIndex.load(path), GalleryIndex.load(path)
    first.add(["first"], target_rows(1))
    second.add(["second"], target_rows(1))
    first.save(path)
    with pytest.raises(IndexFormatError, match="changed by another writer: load it again"):
        second.save(path)
    with pytest.raises(IndexFormatError, match="holds another index"):
        make_index(1).save(path)
    assert GalleryIndex.load(path, verify=True).ids == ("i0", "i1", "i2", "first")
    second.save(path, overwrite=True)
    assert GalleryIndex.load(path, verify=True).ids == ("i0", "i1", "i2", "second")
    second.save(tmp_path / "elsewhere")
    assert GalleryIndex.load(tmp_path / "elsewhere", verify=True).ids == ("i0", "i1", "i2", "second")


def test_another_models_index(make_index: MakeIndex, tmp_path: Path) -> None:
    make_index(1).save(tmp_path / "index")
    with pytest.raises(IndexFormatError, match="made with model mmmmmmmmmmmm, this bundle is nnnnnnnnnnnn"):
        GalleryIndex.load(tmp_path / "index", model_hash="n" * 32)


def test_no_index(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(IndexFormatError, match=r"no index here.*dqe-index"):
            GalleryIndex.load(path)


def test_places_that_cannot_be_written(make_index: MakeIndex, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(IndexFormatError, match="cannot be written"):
        make_index(1).save(tmp_path / "file")


@pytest.mark.parametrize("suffix", ["catalogue", "targets", "images"])
def test_damage_is_found(make_index: MakeIndex, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "index"
    make_index(5, image_storage="f16").save(path)
    (file,) = path.glob(f"*.{suffix}")
    good = file.read_bytes()
    file.write_bytes(good + b"what a killed save left")
    assert GalleryIndex.load(path, verify=True).ids == ("i0", "i1", "i2", "i3", "i4")
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(IndexFormatError, match="checksum differs"):
        GalleryIndex.load(path, verify=True)
    file.write_bytes(good[:-1])
    with pytest.raises(IndexFormatError, match=r"confirmed|checksum differs"):
        GalleryIndex.load(path)
    file.unlink()
    with pytest.raises(IndexFormatError, match="missing; restore it from a copy or index again"):
        GalleryIndex.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3, "novelty": 1}, "schema version 3 is newer than the supported 2; upgrade"),
        ({"schema_version": -1}, "schema_version must be 1 to 2, got -1"),
        ({"kind": "bundle"}, "this is a bundle, not an index; check the path"),
        ({"kind": "web-app"}, "this is of kind 'web-app', not an index"),
        ({"rows": -5}, "rows of at least 0 .* got -5, "),
        ({"target_shape": [0, 4]}, r"got \d+, \(0, 4\)"),
        ({"catalogue": {"name": "00000000.catalogue", "size": -1, "crc32": 0}}, "a size of 0 bytes or more, got -1"),
        ({"novelty": 1}, "unknown field `novelty`"),
        ({"rows": 4}, "disagree"),
        ({"storage": "f16"}, "bytes do not make 5 rows"),
        ({"image_storage": "f16"}, "disagree"),
        ({"targets": {"name": "../../etc/passwd", "size": 0, "crc32": 0}}, "not a file of an index"),
    ],
)
def test_manifests_that_are_refused(make_index: MakeIndex, tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "index"
    make_index(5).save(path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(IndexFormatError, match=message) as caught:
        GalleryIndex.load(path)
    assert "\n" not in str(caught.value)
    (path / "manifest.json").write_text("{")
    with pytest.raises(IndexFormatError, match="not valid JSON"):
        GalleryIndex.load(path)


@pytest.mark.parametrize(("text", "message"), [("[" * 100_000, "not valid JSON"), (" " * (65 << 20), "bytes, expected at most")])
def test_manifests_that_are_no_documents(make_index: MakeIndex, tmp_path: Path, text: str, message: str) -> None:
    make_index(1).save(tmp_path / "index")
    (tmp_path / "index" / "manifest.json").write_text(text)
    with pytest.raises(IndexFormatError, match=message):
        GalleryIndex.load(tmp_path / "index")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "others",
    [
        {"manifest.json": '{"name": "a web app"}', "index.html": "x"},
        {"manifest.json": '{"schema_version": 4, "graphs": []}', "vision_encoder.onnx": "x"},
        {"manifest.json": "{", "0123abcd.images": "x", ".tmp-somebody": "y"},
        {"photo.jpg": "x", "0123abcd.images": "x", ".tmp-somebody": "y"},
        {"lock": "another program's", "0123abcd.targets": "x"},
        {"lock": "another program's"},
        {"lock": "", "photo.jpg": "x"},
    ],
)
def test_nothing_is_written_where_other_things_are(make_index: MakeIndex, tmp_path: Path, others: dict[str, str]) -> None:
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(IndexConflictError, match="and no index; name a new folder"):
            make_index(2).save(tmp_path, overwrite=overwrite)
        assert contents(tmp_path) == before


def test_a_first_save_that_was_killed_is_gone_on_with(make_index: MakeIndex, tmp_path: Path) -> None:
    """At any point: an empty folder, an empty lock, a marked lock and files, with or without the beginnings of a manifest."""
    for n, files in enumerate([{}, {"lock": ""}, {"lock": "gallery-index\n", "0123abcd.targets": "x", ".tmp-0123456789abcdef": "{"}]):
        path = tmp_path / str(n)
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)
        make_index(3).save(path)
        assert GalleryIndex.load(path, verify=True).ids == ("i0", "i1", "i2")
        assert not {"0123abcd.targets", ".tmp-0123456789abcdef"} & set(contents(path))


def test_an_index_of_the_first_schema(make_index: MakeIndex, tmp_path: Path) -> None:
    path = tmp_path / "index"
    make_index(3).save(path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["kind"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    (path / "lock").write_bytes(b"")
    index = GalleryIndex.load(path, verify=True)
    index.add(["new"], target_rows(1))
    index.save(path)
    assert GalleryIndex.load(path, verify=True).ids == ("i0", "i1", "i2", "new")
    found = json.loads((path / "manifest.json").read_text())
    assert (found["kind"], found["schema_version"]) == ("gallery-index", 2)


@pytest.mark.parametrize("name", ["lock", "targets"])
def test_links_are_not_followed(make_index: MakeIndex, tmp_path: Path, name: str) -> None:
    path, victim = tmp_path / "index", tmp_path / "victim"
    index = make_index(3)
    index.save(path)
    victim.write_bytes(b"somebody's")
    file = path / "lock" if name == "lock" else next(path.glob("*.targets"))
    moved = file.rename(tmp_path / "moved")
    if name == "targets":
        victim.write_bytes(moved.read_bytes())
    before = victim.read_bytes()
    file.symlink_to(victim)
    index.add(["new"], target_rows(1))
    with pytest.raises(IndexFormatError, match="cannot be written"):
        index.save(path)
    assert victim.read_bytes() == before


def test_files_have_the_permissions_that_the_umask_leaves(make_index: MakeIndex, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make_index(2).save(tmp_path / "deep" / "index")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "deep" / "index").iterdir()} == {0o640}
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("deep", "deep/index")} == {0o750}


def test_ids_of_numpy(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index()
    index.add(list(np.array(["a", "b"])), target_rows(2))
    index.save(tmp_path / "index")
    assert GalleryIndex.load(tmp_path / "index").ids == ("a", "b")
    assert all(type(id) is str for id in index.ids)


def test_a_catalogue_that_contradicts_itself(make_index: MakeIndex, tmp_path: Path) -> None:
    path, root = tmp_path / "index", tmp_path / "index"
    make_index(2).save(path)
    manifest = json.loads((path / "manifest.json").read_text())
    for events in ([disk.Event(id="a"), disk.Event(id="a")], [disk.Event(id="a"), disk.Event(removed=1)], [disk.Event()]):
        state = disk.extend(root, disk.FileState(name="00000000.catalogue"), [disk.encode_events(events)])
        changed = manifest | {"catalogue": {"name": state.name, "size": state.size, "crc32": state.crc32}}
        (path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(IndexFormatError, match="contradicts itself"):
            GalleryIndex.load(path)


def test_repair_removes_what_no_save_confirmed(make_index: MakeIndex, tmp_path: Path) -> None:
    index, path = make_index(5, image_storage="f16"), tmp_path / "index"
    index.save(path)
    whole = contents(path)
    assert GalleryIndex.repair(path) == RepairReport((), 0, (), (), dropped=False)
    assert contents(path) == whole
    for file in path.glob("*.targets"):
        file.write_bytes(file.read_bytes() + b"torn")
    (path / "0123abcd.images").write_bytes(b"x")
    (path / ".tmp-left-by-a-kill").write_bytes(b"x")
    (path / "readme.txt").write_text("not ours")
    report = GalleryIndex.repair(path)
    assert report == RepairReport((".tmp-left-by-a-kill", "0123abcd.images"), 4, (), (), dropped=False)
    assert report.is_whole
    assert contents(path) == whole | {"readme.txt": b"not ours"}


@pytest.mark.parametrize("suffix", ["targets", "images"])
@pytest.mark.parametrize("short", [False, True])
def test_repair_drops_damaged_rows_when_asked(make_index: MakeIndex, tmp_path: Path, suffix: str, short: bool) -> None:
    index, path = make_index(5, image_storage="f16"), tmp_path / "index"
    index.save(path)
    index.add(["new"], target_rows(1, 5), image_rows(1, 5))
    index.remove(["i2"])
    index.update_metadata({"i0": {"n": 1}})
    index.save(path)  # rows: i0 (gone), i1, i2 (gone), i3, i4, new, i0
    (file,) = path.glob(f"*.{suffix}")
    good, row = file.read_bytes(), file.stat().st_size // 7
    damaged = good[: 4 * row + 1] if short else bytes([*good[:row], good[row] ^ 1, *good[row + 1 : -1], good[-1] ^ 8])
    file.write_bytes(damaged)
    expected = ("i4", "new", "i0") if short else ("i1", "i0")
    assert GalleryIndex.repair(path) == RepairReport((), 0, (file.name,), expected, dropped=False)
    assert file.read_bytes() == damaged
    with pytest.raises(IndexFormatError):
        GalleryIndex.load(path, verify=True)
    report = GalleryIndex.repair(path, drop_damaged=True)
    assert (report.damaged, report.dropped, report.is_whole) == (expected, True, True)
    loaded = GalleryIndex.load(path, verify=True)
    assert loaded.ids == tuple(id for id in index.ids if id not in expected)
    for id in loaded.ids:
        np.testing.assert_array_equal(loaded.image_tokens(id), index.image_tokens(id))
        np.testing.assert_array_equal(loaded.target_tokens(id), index.target_tokens(id))
    assert GalleryIndex.repair(path).is_whole


def test_damage_to_rows_that_are_gone_costs_nothing(make_index: MakeIndex, tmp_path: Path) -> None:
    index, path = make_index(5), tmp_path / "index"
    index.save(path)
    index.remove(["i0"])
    index.save(path)
    (file,) = path.glob("*.targets")
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    assert not GalleryIndex.repair(path).is_whole
    assert GalleryIndex.repair(path, drop_damaged=True).damaged == ()
    assert GalleryIndex.load(path, verify=True).ids == ("i1", "i2", "i3", "i4")


def test_what_only_a_copy_mends(make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IndexFormatError, match="no index here"):
        GalleryIndex.repair(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    path = tmp_path / "index"
    make_index(3).save(path)
    (catalogue,), (targets,) = path.glob("*.catalogue"), path.glob("*.targets")
    good = catalogue.read_bytes()
    catalogue.write_bytes(good.replace(b"i1", b"i7"))
    with pytest.raises(IndexFormatError, match=r"the catalogue is damaged .* restore it from a copy"):
        GalleryIndex.repair(path, drop_damaged=True)
    catalogue.write_bytes(good)
    targets.unlink()
    with pytest.raises(IndexFormatError, match="missing; restore it from a copy"):
        GalleryIndex.repair(path, drop_damaged=True)
    monkeypatch.setattr(Writer, "_checksum", lambda self, row: None)  # an index of before
    old = make_index(3)
    old.save(path, overwrite=True)
    assert GalleryIndex.repair(path).is_whole
    (targets,) = (file for file in path.glob("*.targets") if file.stat().st_size)
    targets.write_bytes(b"\xff" + targets.read_bytes()[1:])
    with pytest.raises(IndexFormatError, match="kept no checksums of rows"):
        GalleryIndex.repair(path, drop_damaged=True)
