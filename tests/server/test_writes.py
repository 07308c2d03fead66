"""Writes of many callers: each is on the disk before it is confirmed, alone in its failures, and never half there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.hostile_images import encoded
from support.samples import noise_image
from support.writing import hold_index, png, revision, there, uploads

from dqe_engine.cli.index import main as index_command
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import DeadlineError, InputError, OverloadError, UnknownItemError
from dqe_engine.index import GalleryIndex
from dqe_engine.server.operations import BusyError, ItemExistsError, Written
from dqe_engine.server.photos import Photos, content_of
from dqe_engine.server.uploads import sweep_uploads
from dqe_engine.server.writes import Writes, make_index


def test_an_item_is_added_described_replaced_and_removed(writes: Writes, index_path: Path, engine: RetrievalEngine, tmp_path: Path) -> None:
    first, second = content_of(png(1)), content_of(png(2))
    assert writes.add("a", png(1), {"n": 1}).result(60) == Written("a", first, revision(index_path) or "")
    assert there(index_path) == {"a": ({"n": 1}, first)}
    assert writes.update("a", {"n": 2}).result(60) == Written("a", first, revision(index_path) or "")
    assert there(index_path) == {"a": ({"n": 2}, first)}
    with pytest.raises(ItemExistsError, match=r"^'a' is in the index already; remove it, or ask for it to be replaced$"):
        writes.add("a", png(2)).result(60)
    assert writes.add("a", png(2), replace=True).result(60).content == second
    assert there(index_path) == {"a": (None, second)}
    assert uploads(tmp_path) == {second}
    np.testing.assert_allclose(
        GalleryIndex.load(index_path).target_tokens("a"), engine.encode_images([noise_image(2)]).target_tokens[0], atol=1e-6
    )
    assert writes.remove("a").result(60) == Written("a", None, revision(index_path) or "")
    assert there(index_path) == {}
    assert uploads(tmp_path) == set()
    for call in (writes.remove("a"), writes.update("a", None)):
        with pytest.raises(UnknownItemError, match=r"^'a' is not in the index$"):
            call.result(60)


def test_what_is_known_to_be_wrong_is_refused_at_once(writes: Writes, index_path: Path) -> None:
    before = revision(index_path)
    for call in (
        lambda: writes.add("", png(1)), lambda: writes.add("\ud800", png(1)), lambda: writes.add("a", png(1), {"x": float("nan")}),
        lambda: writes.add("a", "text"), lambda: writes.update("a", {1: 2}), lambda: writes.remove(""),
        lambda: writes.add("a", png(1), [1]),
    ):  # fmt: skip
        with pytest.raises(InputError):
            call()
    for data in (b"", b"not an image", png(1)[:50], encoded(Image.new("1", (9000, 9000)), "PNG")):
        with pytest.raises(InputError, match="bytes>"):
            writes.add("a", data).result(60)
    assert revision(index_path) == before


def test_what_waits_is_saved_at_once_and_each_fails_alone(
    index_path: Path, engine: RetrievalEngine, photos: Photos, tmp_path: Path
) -> None:
    saves: list[str | None] = []
    writes = Writes(index_path, engine, photos, patience=60, saved=lambda: saves.append(revision(index_path)))
    writes.add("there", png(0)).result(60)
    let_go, thread = hold_index(index_path)
    futures = [writes.add("first", png(1))]  # waits for the lock; those after it wait for this one
    while writes.waiting:
        pass
    futures += [writes.add(f"i{n}", png(n)) for n in range(2, 8)]
    bad = [writes.add("there", png(9)), writes.add("bad", b"\x89PNG\r\n\x1a\nbad"), writes.remove("nowhere"), writes.update("nowhere", {})]
    futures += [writes.update("i2", {"x": 1}), writes.remove("i3"), writes.add("i4", png(40), replace=True), writes.add("i3", png(30))]
    let_go.set()
    thread.join()
    assert [future.result(60).id for future in futures[-4:]] == ["i2", "i3", "i4", "i3"]
    assert [type(future.exception(60)) for future in bad] == [ItemExistsError, InputError, UnknownItemError, UnknownItemError]
    assert len({future.result(60).revision for future in futures[1:]}) == 1
    assert saves == list(dict.fromkeys([saves[0], *(future.result(60).revision for future in futures)]))
    found = there(index_path)
    assert list(found) == ["there", "first", "i5", "i6", "i7", "i2", "i4", "i3"]
    assert found["i2"] == ({"x": 1}, content_of(png(2)))
    assert found["i3"][1] == content_of(png(30))
    assert uploads(tmp_path) == {content for _, content in found.values()}
    writes.close()


def test_a_sweep_takes_what_no_item_refers_to(
    writes: Writes, photos: Photos, index_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kill between an upload and its save leaves it."""
    folder = tmp_path / "uploads"
    assert sweep_uploads(index_path, folder, older_than=-60) == 0
    writes.add("a", png(1)).result(60)
    photos.store(png(2))
    assert sweep_uploads(index_path, folder) == 0
    assert [sweep_uploads(index_path, folder, older_than=-60, delete=delete) for delete in (False, True, True)] == [1, 1, 0]
    assert uploads(tmp_path) == {content_of(png(1))}
    photos.store(png(3))
    old = folder / content_of(png(3))[:2] / content_of(png(3))[2:]
    os.utime(old, (1, 1))
    assert index_command(["sweep", str(index_path), "--uploads", str(folder)]) == 0
    assert "1 images that no item" in capsys.readouterr().out
    assert old.exists()
    assert index_command(["sweep", str(index_path), "--uploads", str(folder), "--yes"]) == 0
    assert not old.exists()


def test_what_was_uploaded_for_an_item_that_exists_does_not_stay(writes: Writes, photos: Photos, tmp_path: Path) -> None:
    writes.add("a", png(1)).result(60)
    for seed in (1, 2):
        with pytest.raises(ItemExistsError):
            writes.add("a", png(seed)).result(60)
        assert uploads(tmp_path) == {content_of(png(1))}


def test_an_upload_goes_with_the_last_item_that_has_it(writes: Writes, tmp_path: Path) -> None:
    for id in ("a", "b"):
        writes.add(id, png(1)).result(60)
    writes.remove("a").result(60)
    assert uploads(tmp_path) == {content_of(png(1))}
    writes.add("b", png(1), replace=True).result(60)
    assert uploads(tmp_path) == {content_of(png(1))}
    writes.add("b", png(2), replace=True).result(60)
    assert uploads(tmp_path) == {content_of(png(2))}


def test_an_upload_that_was_removed_on_the_way_is_stored_again(
    index_path: Path, engine: RetrievalEngine, photos: Photos, tmp_path: Path
) -> None:
    writes = Writes(index_path, engine, photos, patience=60)
    let_go, thread = hold_index(index_path)
    future = writes.add("a", png(1))
    while not uploads(tmp_path):
        pass
    photos.remove(content_of(png(1)))
    let_go.set()
    thread.join()
    future.result(60)
    assert uploads(tmp_path) == {content_of(png(1))}
    writes.close()


@pytest.mark.parametrize("image_storage", ["none", "f32"])
def test_indexes_of_other_storage(engine: RetrievalEngine, tmp_path: Path, image_storage: Any) -> None:
    make_index(engine.bundle, tmp_path / "index", storage="f16", image_storage=image_storage)
    writes = Writes(tmp_path / "index", engine)
    writes.add("a", png(1), {"n": 1}).result(60)
    writes.update("a", {"n": 2}).result(60)
    assert there(tmp_path / "index") == {"a": ({"n": 2}, content_of(png(1)))}
    writes.close()


def test_a_bulk_job_is_waited_for_a_while(index_path: Path, engine: RetrievalEngine) -> None:
    writes = Writes(index_path, engine, patience=0.05)
    let_go, thread = hold_index(index_path)
    with pytest.raises(BusyError, match=r"index is being written by another process; ask again later$") as failure:
        writes.add("a", png(1)).result(60)
    assert failure.value.retry_after >= 1
    let_go.set()
    thread.join()
    writes.add("a", png(1)).result(60)
    import fcntl

    with open(index_path / "lock", "rb") as lock:  # that of a save which takes long
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            writes.remove("a").result(60)
    writes.remove("a").result(60)
    writes.close()


def test_deadlines_cancellation_and_a_full_queue(index_path: Path, engine: RetrievalEngine) -> None:
    writes = Writes(index_path, engine, patience=60, room=4, room_bytes=3 * len(png(1)))
    let_go, thread = hold_index(index_path)
    first = writes.add("first", png(1))
    while writes.waiting:
        pass
    late, cancelled, waits = writes.add("late", png(1), timeout=0), writes.remove("x"), writes.add("waits", png(1), timeout=60)
    with pytest.raises(OverloadError, match="3 changes of 0 MiB wait to be written already; ask again later"):
        writes.add("bytes", png(1))
    writes.update("x", None)
    with pytest.raises(OverloadError, match="4 changes"):
        writes.remove("room")
    assert cancelled.cancel()
    let_go.set()
    thread.join()
    assert first.result(60)
    assert waits.result(60)
    with pytest.raises(DeadlineError, match="the change was not written by its deadline, and will not be"):
        late.result(60)
    assert list(there(index_path)) == ["first", "waits"]
    assert writes.add("more", png(1)).result(60)
    writes.close()


def test_what_is_late_when_the_lock_comes_is_not_written(
    index_path: Path, engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(index_path, engine, patience=60)
    let_go, thread = hold_index(index_path)
    future = writes.add("late", png(1), timeout=3600)
    while writes.waiting:
        pass
    monkeypatch.setattr("dqe_engine.server.operations.Operation.is_late", True)
    let_go.set()
    thread.join()
    with pytest.raises(DeadlineError):
        future.result(60)
    assert there(index_path) == {}
    writes.close()


def test_closing_finishes_what_waits(index_path: Path, engine: RetrievalEngine) -> None:
    Writes(index_path, engine).close()
    writes = Writes(index_path, engine, most=3)
    futures = [writes.add(f"i{n}", png(n)) for n in range(10)]
    writes.close()
    writes.close()
    assert all(future.done() for future in futures)
    assert len(there(index_path)) == 10
    with pytest.raises(OverloadError, match="shutting down"):
        writes.remove("i0")
