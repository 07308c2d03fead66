"""Uploads: kept once by their content, mended where they are damaged, swept when nothing refers to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dqe_engine.server.photos import NoPhotoError, Photos, UploadError, content_of
from dqe_engine.server.uploads import MARKER, Uploads


@pytest.mark.parametrize(
    "content", ["", "..", "../../etc/passwd", "/etc/passwd", "f" * 31, "F" * 32, "f" * 33, "\0" * 32, "é" * 32, "aa/" + "b" * 29]
)
def test_no_content_leads_out_of_the_uploads(tmp_path: Path, content: str) -> None:
    photos = Photos([], tmp_path / "uploads")
    photos.store(b"x")
    assert not photos.has_upload(content)
    assert not photos.remove(content)
    with pytest.raises(NoPhotoError):
        photos.original("x", content)


def test_uploads_are_kept_once_and_mended(tmp_path: Path) -> None:
    photos = Photos([], tmp_path / "deep" / "uploads")
    content = photos.store(b"one")
    assert content == photos.store(b"one") == content_of(b"one")
    (path,) = [path for path in (tmp_path / "deep" / "uploads").rglob("*") if path.is_file() and path.name != MARKER]
    assert path.parent.name + path.name == content
    path.write_bytes(b"two")
    assert photos.store(b"one") == content
    assert path.read_bytes() == b"one"
    path.unlink()
    (tmp_path / "other").write_bytes(b"other")
    path.symlink_to(tmp_path / "other")
    assert not photos.has_upload(content)
    photos.store(b"one")
    assert path.read_bytes() == b"one"
    assert not path.is_symlink()
    assert (tmp_path / "other").read_bytes() == b"other"
    assert photos.remove(content)
    assert not photos.remove(content)
    assert not photos.has_upload(content)


def test_nothing_is_stored_in_or_deleted_from_a_folder_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / ("c" * 30)).write_bytes(b"somebody's")
    photos = Photos([], folder)
    with pytest.raises(UploadError, match=r"documents holds other things \(ab\) and no dqe-uploads, so nothing is stored there"):
        photos.store(b"x")
    with pytest.raises(UploadError, match="so it is no folder of uploads; nothing was deleted"):
        Uploads(folder).sweep((), older_than=-1)
    with pytest.raises(UploadError, match="nothing was deleted"):
        photos.remove("ab" + "c" * 30)
    (folder / MARKER).write_bytes(b"something else")
    for call in (lambda: Uploads(folder).sweep((), older_than=-1), lambda: photos.store(b"x")):
        with pytest.raises(UploadError, match="is something else"):
            call()
    assert sorted(path.name for path in folder.rglob("*")) == ["ab", "c" * 30, MARKER]


def test_a_sweep_takes_what_nobody_knows_and_is_old(tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    photos = Photos([], folder)
    assert Uploads(folder).sweep((), older_than=-1) == 0
    known, old, fresh = (photos.store(data) for data in (b"known", b"old", b"fresh"))
    place = folder / old[:2]
    (place / ".tmp-0123456789abcdef").write_bytes(b"of a killed writer")
    (place / "notes.txt").write_text("somebody's")
    (place / ("e" * 30)).symlink_to(tmp_path)
    (folder / "notes").mkdir()
    (folder / "notes" / ("d" * 30)).write_text("somebody's")
    for path in (*place.iterdir(), folder / known[:2] / known[2:]):
        os.utime(path, (1, 1), follow_symlinks=False)
    assert Uploads(folder).sweep({known}, older_than=3600) == 2
    assert [photos.has_upload(content) for content in (known, old, fresh)] == [True, False, True]
    assert {path.name for path in place.iterdir()} == {"notes.txt", "e" * 30}
    assert (folder / "notes" / ("d" * 30)).exists()
    os.utime(folder / known[:2] / known[2:], (1, 1))
    photos.store(b"known")
    assert Uploads(folder).sweep((), older_than=3600) == 0
    assert Uploads(folder).sweep((), older_than=-60) == 2


def test_a_disk_that_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UploadError, match=r"not a directory|exists|Not a directory") as failure:
        Photos([], tmp_path / "file" / "uploads").store(b"x")
    assert isinstance(failure.value.__cause__, OSError)
    with pytest.raises(UploadError, match="the server has no folder for uploads; start it with --uploads FOLDER"):
        Photos([]).store(b"x")
