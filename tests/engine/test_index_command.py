"""`dqe-index`: its outcomes counted, metadata from tables, other writers, and its tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.samples import noise_image
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.cli import index as index_command
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import IndexFormatError
from dqe_engine.index import GalleryIndex
from dqe_engine.index.metadata_file import read_metadata
from dqe_engine.indexer import Indexer

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return index_command.main([str(argument) for argument in arguments])


def index(bundle: Path, images: Path, out: Path, *options: object) -> int:
    return run(bundle, images, "--out", out, "--batch-size", 2, "--save-every", 4, "--provider", "cpu", "--threads", 1, *options)


def counts(out: str) -> str:
    """What the command said last, without the place."""
    return out.strip().splitlines()[-1].partition(": ")[2]


@pytest.fixture
def indexed(bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: Capture) -> Path:
    assert index(bundle_path, image_folder, tmp_path / "index") == 0
    capsys.readouterr()
    return tmp_path / "index"


def test_every_outcome_is_counted(bundle_path: Path, image_folder: Path, indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    noise_image(100).save(image_folder / "00.png")
    noise_image(200).save(image_folder / "new.jpg")
    (image_folder / "02.png").unlink()
    (image_folder / "04.png").write_bytes((image_folder / "06.png").read_bytes()[:70])
    (tmp_path / "metadata.csv").write_text("id,brand\n06.png,x\n00.png,y\n")
    files = {path.name: path.read_bytes() for path in indexed.iterdir()}
    options = ("--prune", "--skip-bad", "--metadata", tmp_path / "metadata.csv")
    said = "1 added, 1 changed, 1 with other metadata, 8 unchanged, 3 skipped (1 damaged, 2 not an image), 1 pruned"
    assert index(bundle_path, image_folder, indexed, *options, "--dry-run") == 0
    assert counts(capsys.readouterr().out) == f"{said}; nothing was written"
    assert {path.name: path.read_bytes() for path in indexed.iterdir()} == files
    assert index(bundle_path, image_folder, indexed, *options) == 0
    assert counts(capsys.readouterr().out) == f"{said}; 12 in the index"
    found = GalleryIndex.load(indexed, verify=True)
    assert "02.png" not in found
    assert [item.metadata for item in found.get(["00.png", "06.png", "04.png"])] == [{"brand": "y"}, {"brand": "x"}, None]
    assert found.count({"brand": {"in": ["x", "y"]}}) == 2


def test_a_dry_run_makes_no_index(bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert index(bundle_path, image_folder, tmp_path / "index", "--dry-run") == 0
    assert counts(capsys.readouterr().out).startswith("12 added")
    assert not (tmp_path / "index").exists()


def test_prune_with_another_folder(bundle_path: Path, image_folder: Path, indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other"
    other.mkdir()
    noise_image(50).save(other / "shoe.png")
    assert index(bundle_path, other, indexed, "--prune") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: --prune would remove 12 of the 12 items in {indexed}, whose images are not in {other}; if it is the right folder"
    )
    assert error.count("\n") == 1
    assert len(GalleryIndex.load(indexed)) == 12
    assert index(bundle_path, other, indexed, "--prune", "--dry-run") == 0
    assert "12 pruned" in capsys.readouterr().out
    assert index(bundle_path, other, indexed, "--prune", "--yes") == 0
    assert "12 pruned; 1 in the index" in capsys.readouterr().out
    assert GalleryIndex.load(indexed).ids == ("shoe.png",)


def test_two_folders_with_equal_names(bundle_path: Path, image_folder: Path, indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for seed in range(0, 12, 2):
        noise_image(50 + seed).save(other / f"{seed:02}.png")
    assert index(bundle_path, other, indexed, "--add-only") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 6 images differ from those that were indexed under the same ids")
    assert "prefix" in error
    assert index(bundle_path, other, indexed, "--prefix", "other/") == 0
    assert "6 added, 0 changed" in capsys.readouterr().out
    assert {"00.png", "other/00.png"} < set(GalleryIndex.load(indexed).ids)
    for name in ("00.png", "02.png"):
        (other / name).unlink()
    assert index(bundle_path, other, indexed, "--prefix", "other/", "--prune") == 0
    assert "2 pruned; 16 in the index" in capsys.readouterr().out
    assert index(bundle_path, image_folder, indexed, "--prefix", "other/", "--prune", "--dry-run") == 0
    assert index(bundle_path, image_folder, indexed, "--prefix", "x/", "--force") == 2
    assert "--force replaces the whole index" in capsys.readouterr().err
    assert index(bundle_path, other, indexed) == 0
    assert "0 added, 4 changed" in capsys.readouterr().out


def test_force_keeps_metadata_and_counts_what_is_gone(bundle_path: Path, image_folder: Path, indexed: Path, capsys: Capture) -> None:
    with GalleryIndex.load(indexed) as found:
        found.update_metadata({"00.png": {"n": 0}, "02.png": {"n": 2}})
        found.save(indexed)
    (image_folder / "02.png").unlink()
    for options in (("--dry-run",), ()):
        assert index(bundle_path, image_folder, indexed, "--force", *options) == 0
        assert "11 added" in (said := capsys.readouterr().out)
        assert "1 pruned" in said
    assert {item.id: item.metadata for item in GalleryIndex.load(indexed) if item.metadata} == {"00.png": {"n": 0}}


def test_changes_are_saved_as_they_come(
    bundle_path: Path, image_folder: Path, indexed: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted among changed images, the next run has only the others to do."""
    for file in image_folder.rglob("*.png"):
        noise_image(100 + int(file.stem)).save(file)
    add_batch, calls = Indexer._add_batch, []

    def interrupted(self: Indexer, *args: Any) -> None:
        add_batch(self, *args)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Indexer, "_add_batch", interrupted)
    assert index(bundle_path, image_folder, indexed) == 130
    assert index(bundle_path, image_folder, indexed) == 0
    assert "0 added, 6 changed, 0 with other metadata, 6 unchanged" in capsys.readouterr().out


def test_a_table_is_typed_column_by_column(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(
        b"\xef\xbb\xbfid,price,ean,stock,mixed,code,text,big,far\r\n"
        b'"a,1",12.5,4006381333931,true,1,007,"two\r\nlines, ""quoted""",18446744073709551616,1e999\r\n'
        b"\r\nb,-3,4006381333932,false,x,012,,1,2\r\n"
        b"c,,,,,,,,\r\n"
    )
    assert read_metadata(tmp_path / "m.csv") == {
        "a,1": {
            "price": 12.5, "ean": 4006381333931, "stock": True, "mixed": "1", "code": "007", "text": 'two\r\nlines, "quoted"',
            "big": "18446744073709551616", "far": "1e999",
        },
        "b": {"price": -3, "ean": 4006381333932, "stock": False, "mixed": "x", "code": "012", "big": "1", "far": "2"},
        "c": None,
    }  # fmt: skip


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b'\xef\xbb\xbf{"id": "a", "tags": ["x", 1], "code": "007"}\r\n\r\n{"n": null, "id": "b"}\r\n{"id":"c"}')
    assert read_metadata(tmp_path / "m") == {"a": {"tags": ["x", 1], "code": "007"}, "b": {"n": None}, "c": None}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"id": "a"}\n{"id": "b"\n', "line 2: not valid JSON"),
        (b'{"id": "a"}\n\n[1]\n', "line 3: expected an object"),
        (b'{"id": 5}', 'line 1: expected an object with a string "id"'),
        (b'{"id": "a"}\n{"id": "b"}\n{"id": "a"}', "line 3: 'a' again, after line 1"),
        (b'{"id": "a", "x": ' + b"[" * 5000, "line 1: not valid JSON"),
        (b'{"id": ""}', "line 1: ids are non-empty strings"),
        (b'[{"id": "a"}]', "line 1: a JSON array"),
        (b"id,x\na,1\nb,2,3\n", "line 3: 3 cells, expected 2"),
        (b'id,x\n"a\nb",1\nc\n', "line 4: 1 cells, expected 2"),
        (b'id,x\na,"1"2\n', "line 2: not CSV"),
        (b'id,x\na,"1', "line 2: not CSV"),
        (b"id,x\na,1\na,2\n", "line 3: 'a' again, after line 2"),
        (b"id;x\na;1\n", "line 1: expected a JSON object, or column names"),
        (b"id,x,x\na,1,2\n", "line 1: expected a JSON object, or column names"),
        (b"", "line 1: expected a JSON object"),
        (b"id,x\na,caf\xe9\n", "line 2: not UTF-8"),
        ("id,x\na,1\n".encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_lines_that_cannot_be_used(indexed: Path, content: bytes, said: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "m").write_bytes(content)
    assert run("metadata", indexed, tmp_path / "m") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'm'}, {said}")
    assert error.count("\n") == 1
    assert len(error) < 500


def test_metadata_without_photos(indexed: Path, image_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.rmtree(image_folder)
    (tmp_path / "m.csv").write_text("id,price\n00.png,5\nsub/01.png,7\n")
    assert run("metadata", indexed, tmp_path / "m.csv", "--dry-run") == 0
    assert counts(capsys.readouterr().out).endswith("2 with other metadata, 10 unchanged, 0 skipped, 0 pruned; nothing was written")
    assert GalleryIndex.load(indexed).count({"price": {">": 0}}) == 0
    assert run("metadata", indexed, tmp_path / "m.csv") == 0
    assert run("metadata", indexed, tmp_path / "m.csv") == 0
    assert "0 with other metadata, 12 unchanged" in capsys.readouterr().out
    assert run("list", indexed, "--filter", '{"price": {">": 5}}') == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"id": "sub/01.png", "price": 7}]
    (tmp_path / "m.csv").write_text("id,price\n00.png,6\nx,1\ny,2\n")
    assert run("metadata", indexed, tmp_path / "m.csv") == 2
    assert "metadata for 2 ids that neither the images nor the index have: 'x', 'y'" in capsys.readouterr().err
    assert run("metadata", indexed, tmp_path / "m.csv", "--ignore-unknown") == 0
    assert "1 with other metadata" in capsys.readouterr().out


def test_the_copies_that_metadata_makes_are_saved_some_at_a_time(indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqe_engine.indexer._DESCRIBED_AT_ONCE", 5)
    save, seen = GalleryIndex.save, []

    def watched(self: GalleryIndex, *arguments: Any, **options: Any) -> None:
        seen.append(self.stats().unsaved)
        save(self, *arguments, **options)

    monkeypatch.setattr(GalleryIndex, "save", watched)
    (tmp_path / "m.csv").write_text("id,n\n" + "".join(f"{id},1\n" for id in GalleryIndex.load(indexed).ids))
    assert run("metadata", indexed, tmp_path / "m.csv") == 0
    assert seen == [10, 10, 4]  # a removal and an addition of each
    assert GalleryIndex.load(indexed, verify=True).count({"n": 1}) == 12


def test_another_writer_is_told_in_words_of_the_command(
    indexed: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.csv").write_text("id,n\n00.png,1\n")
    update = GalleryIndex.update_metadata

    def overtaken(self: GalleryIndex, metadata: Any) -> None:
        monkeypatch.undo()
        other = GalleryIndex.load(indexed)
        other.remove(["02.png"])
        other.save(indexed)
        update(self, metadata)

    monkeypatch.setattr(GalleryIndex, "update_metadata", overtaken)
    assert run("metadata", indexed, tmp_path / "m.csv") == 2
    assert capsys.readouterr().err.startswith(f"error: {indexed}: another process wrote to this index meanwhile; when it is done, run")
    assert run("metadata", indexed, tmp_path / "m.csv") == 0
    assert GalleryIndex.load(indexed).count({"n": 1}) == 1
    assert len(GalleryIndex.load(indexed)) == 11


def test_a_list_can_be_given_back(indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    with GalleryIndex.load(indexed) as found:
        found.update_metadata({"00.png": {"n": 0, "tags": ["x"]}, "02.png": {"n": 2.5}})
        found.save(indexed)
    assert run("list", indexed) == 0
    (tmp_path / "list").write_text(capsys.readouterr().out)
    assert run("metadata", indexed, tmp_path / "list") == 0
    assert "0 with other metadata, 12 unchanged" in capsys.readouterr().out


def test_stats_verify_and_compact(indexed: Path, capsys: Capture) -> None:
    with GalleryIndex.load(indexed) as found:
        found.remove(["00.png", "02.png"])
        found.save(indexed)
    assert run("stats", indexed) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["items"], stats["removed"], stats["storage"], stats["without_content_hash"]) == (10, 2, "f32", 0)
    assert run("compact", indexed) == 0
    assert "dropped 2 rows of removed and replaced items; 10 items" in capsys.readouterr().out
    assert GalleryIndex.load(indexed).stats().removed == 0
    assert run("verify", indexed) == 0
    targets = indexed / json.loads((indexed / "manifest.json").read_bytes())["targets"]["name"]
    data = bytearray(targets.read_bytes())
    data[-1] ^= 1
    targets.write_bytes(data)
    assert run("verify", indexed) == 2
    assert "its bytes changed" in capsys.readouterr().err
    for tool in ("stats", "verify", "compact", "list"):
        assert run(tool, indexed / "absent") == 2
        assert "no index here" in capsys.readouterr().err


def test_publish(bundle_path: Path, image_folder: Path, indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    served = tmp_path / "served"
    assert run("publish", indexed, served) == 0
    reader = GalleryIndex.load(served)
    searched = reader.search(reader.target_tokens("00.png")[:1], 3)
    (image_folder / "02.png").unlink()
    assert index(bundle_path, image_folder, tmp_path / "new", "--storage", "f32") == 0
    assert run("publish", tmp_path / "new", served) == 0
    assert len(reader) == 12
    assert reader.search(reader.target_tokens("00.png")[:1], 3) == searched
    assert reader.refresh()
    assert "02.png" not in reader
    assert len(reader) == len(GalleryIndex.load(tmp_path / "new", verify=True)) == 11

    other = build_tiny_bundle(tmp_path / "other", seed=1)
    assert index(other, image_folder, tmp_path / "theirs") == 0
    capsys.readouterr()
    assert run("publish", tmp_path / "theirs", served) == 2
    assert capsys.readouterr().err.startswith(f"error: {served} was made with model {reader.model_hash[:12]}")
    assert run("publish", tmp_path / "theirs", served, "--other-model") == 0
    with pytest.raises(IndexFormatError, match="was made with model"):
        reader.refresh()


def test_what_is_not_published(bundle_path: Path, indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    RetrievalEngine.load(bundle_path, provider="cpu", threads=1).save_index(tmp_path / "empty")
    shutil.copytree(indexed, tmp_path / "damaged")
    (targets,) = (tmp_path / "damaged").glob("*.targets")
    targets.write_bytes(b"\1" + targets.read_bytes()[1:])
    before = (indexed / "manifest.json").read_bytes()
    for new, said in ((indexed, "are the same folder"), (tmp_path / "empty", "no images in this index"), (tmp_path / "damaged", "changed")):
        assert run("publish", new, indexed) == 2
        assert said in capsys.readouterr().err
        assert (indexed / "manifest.json").read_bytes() == before
    site = tmp_path / "site"
    site.mkdir()
    (site / "page.html").write_text("a page")
    assert run("publish", indexed, site) == 2
    assert "holds other things" in capsys.readouterr().err


def test_a_bundle_that_is_called_as_a_tool(
    bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle_path, tmp_path / "stats")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):  # taken for the tool, which says what it expects
        run("stats", image_folder, "--out", "index")
    assert run("./stats", image_folder, "--out", "index", "--provider", "cpu") == 0
    assert "12 added" in capsys.readouterr().out
