"""Writes of many callers and processes: each is on the disk before it is confirmed, alone in its failures, and never half there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.hostile_images import encoded
from support.permissions import enforced_permissions
from support.samples import noise_image

from dqe_engine.cli.index import main as index_command
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import DeadlineError, IndexConflictError, IndexFormatError, InputError, OverloadError
from dqe_engine.files import directory_lock
from dqe_engine.index import GalleryIndex
from dqe_engine.server.operations import BusyError, ItemExistsError, UnknownItemError, Written
from dqe_engine.server.photos import Photos, UploadError, content_of
from dqe_engine.server.uploads import MARKER, sweep_uploads
from dqe_engine.server.writes import Writes, make_index


def png(seed: int) -> bytes:
    return encoded(noise_image(seed), "PNG")


@pytest.fixture
def path(engine: RetrievalEngine, tmp_path: Path) -> Path:
    """Of an empty index."""
    assert make_index(engine.bundle, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos([], tmp_path / "uploads")


@pytest.fixture
def writes(path: Path, engine: RetrievalEngine, photos: Photos) -> Iterator[Writes]:
    made = Writes(path, engine, photos)
    yield made
    made.close()


def there(path: Path) -> dict[str, tuple[Any, str | None]]:
    """Metadata and content by id, of all that is saved; everything is read and held against its checksums."""
    with GalleryIndex.load(path, verify=True) as index:
        return {item.id: (item.metadata, item.content) for item in index}


def uploads(tmp_path: Path) -> set[str]:
    return {file.parent.name + file.name for file in (tmp_path / "uploads").rglob("*") if file.is_file() and file.name != MARKER}


def revision(path: Path) -> str | None:
    return GalleryIndex.load(path).stats().revision


def test_an_item_is_added_described_replaced_and_removed(writes: Writes, path: Path, engine: RetrievalEngine, tmp_path: Path) -> None:
    first, second = content_of(png(1)), content_of(png(2))
    assert writes.add("a", png(1), {"n": 1}).result(60) == Written("a", first, revision(path) or "")
    assert there(path) == {"a": ({"n": 1}, first)}
    assert writes.update("a", {"n": 2}).result(60) == Written("a", first, revision(path) or "")
    assert there(path) == {"a": ({"n": 2}, first)}
    with pytest.raises(ItemExistsError, match=r"^'a' is in the index already; remove it, or ask for it to be replaced$"):
        writes.add("a", png(2)).result(60)
    assert writes.add("a", png(2), replace=True).result(60).content == second
    assert there(path) == {"a": (None, second)}
    assert uploads(tmp_path) == {second}
    np.testing.assert_allclose(
        GalleryIndex.load(path).target_tokens("a"), engine.encode_images([noise_image(2)]).target_tokens[0], atol=1e-6
    )
    assert writes.remove("a").result(60) == Written("a", None, revision(path) or "")
    assert there(path) == {}
    assert uploads(tmp_path) == set()
    for call in (writes.remove("a"), writes.update("a", None)):
        with pytest.raises(UnknownItemError, match=r"^'a' is not in the index$"):
            call.result(60)


def test_what_is_known_to_be_wrong_is_refused_at_once(writes: Writes, path: Path) -> None:
    before = revision(path)
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
    assert revision(path) == before


def hold(path: Path) -> tuple[threading.Event, threading.Thread]:
    """Hold the index's lock until the event is set."""
    held, let_go = threading.Event(), threading.Event()

    def work() -> None:
        with directory_lock(path):
            held.set()
            let_go.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(60)
    return let_go, thread


def test_what_waits_is_saved_at_once_and_each_fails_alone(path: Path, engine: RetrievalEngine, photos: Photos, tmp_path: Path) -> None:
    saves: list[str | None] = []
    writes = Writes(path, engine, photos, patience=60, saved=lambda: saves.append(revision(path)))
    writes.add("there", png(0)).result(60)
    let_go, thread = hold(path)
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
    found = there(path)
    assert list(found) == ["there", "first", "i5", "i6", "i7", "i2", "i4", "i3"]
    assert found["i2"] == ({"x": 1}, content_of(png(2)))
    assert found["i3"][1] == content_of(png(30))
    assert uploads(tmp_path) == {content for _, content in found.values()}
    writes.close()


def test_a_sweep_takes_what_no_item_refers_to(
    writes: Writes, photos: Photos, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kill between an upload and its save leaves it."""
    folder = tmp_path / "uploads"
    assert sweep_uploads(path, folder, older_than=-60) == 0
    writes.add("a", png(1)).result(60)
    photos.store(png(2))
    assert sweep_uploads(path, folder) == 0
    assert [sweep_uploads(path, folder, older_than=-60, delete=delete) for delete in (False, True, True)] == [1, 1, 0]
    assert uploads(tmp_path) == {content_of(png(1))}
    photos.store(png(3))
    old = folder / content_of(png(3))[:2] / content_of(png(3))[2:]
    os.utime(old, (1, 1))
    assert index_command(["sweep", str(path), "--uploads", str(folder)]) == 0
    assert "1 images that no item" in capsys.readouterr().out
    assert old.exists()
    assert index_command(["sweep", str(path), "--uploads", str(folder), "--yes"]) == 0
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


def test_an_upload_that_was_removed_on_the_way_is_stored_again(path: Path, engine: RetrievalEngine, photos: Photos, tmp_path: Path) -> None:
    writes = Writes(path, engine, photos, patience=60)
    let_go, thread = hold(path)
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


def test_a_bulk_job_is_waited_for_a_while(path: Path, engine: RetrievalEngine) -> None:
    writes = Writes(path, engine, patience=0.05)
    let_go, thread = hold(path)
    with pytest.raises(BusyError, match=r"index is being written by another process; ask again later$") as failure:
        writes.add("a", png(1)).result(60)
    assert failure.value.retry_after >= 1
    let_go.set()
    thread.join()
    writes.add("a", png(1)).result(60)
    import fcntl

    with open(path / "lock", "rb") as lock:  # that of a save which takes long
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            writes.remove("a").result(60)
    writes.remove("a").result(60)
    writes.close()


def test_deadlines_cancellation_and_a_full_queue(path: Path, engine: RetrievalEngine) -> None:
    writes = Writes(path, engine, patience=60, room=4, room_bytes=3 * len(png(1)))
    let_go, thread = hold(path)
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
    with pytest.raises(DeadlineError, match="not written within its time, and not any more"):
        late.result(60)
    assert list(there(path)) == ["first", "waits"]
    assert writes.add("more", png(1)).result(60)
    writes.close()


def test_what_is_late_when_the_lock_comes_is_not_written(path: Path, engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(path, engine, patience=60)
    let_go, thread = hold(path)
    future = writes.add("late", png(1), timeout=3600)
    while writes.waiting:
        pass
    monkeypatch.setattr("dqe_engine.server.operations.Operation.is_late", True)
    let_go.set()
    thread.join()
    with pytest.raises(DeadlineError):
        future.result(60)
    assert there(path) == {}
    writes.close()


def test_closing_finishes_what_waits(path: Path, engine: RetrievalEngine) -> None:
    Writes(path, engine).close()
    writes = Writes(path, engine, most=3)
    futures = [writes.add(f"i{n}", png(n)) for n in range(10)]
    writes.close()
    writes.close()
    assert all(future.done() for future in futures)
    assert len(there(path)) == 10
    with pytest.raises(OverloadError, match="shutting down"):
        writes.remove("i0")


def test_others_may_write_meanwhile(writes: Writes, path: Path, engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not know of our lock, `dqe-index` say, comes between the reading and the save."""
    writes.add("a", png(1)).result(60)
    save, foreign = GalleryIndex.save, 0

    def after_another(index: GalleryIndex, *arguments: Any, **options: Any) -> None:
        nonlocal foreign
        if foreign < most:
            foreign += 1
            other = GalleryIndex.load(path)
            encoded_images = engine.encode_images([noise_image(foreign)])
            other.add([f"foreign{foreign}"], encoded_images.target_tokens, encoded_images.image_tokens, replace=True)
            save(other, path)
        save(index, *arguments, **options)

    monkeypatch.setattr(GalleryIndex, "save", after_another)
    most = 1
    writes.add("b", png(2)).result(60)
    assert list(there(path)) == ["a", "foreign1", "b"]
    foreign, most = 0, 2
    with pytest.raises(IndexConflictError, match="was changed by another writer"):
        writes.add("c", png(2)).result(60)
    assert list(there(path)) == ["a", "b", "foreign1", "foreign2"]
    writes.add("c", png(2)).result(60)
    assert "c" in there(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_fails_its_group_and_no_other(
    path: Path, engine: RetrievalEngine, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whichever call fails, and whether it fails once or from then on."""
    writes, count, failing, on = Writes(path, engine, photos), 0, 0, False
    names = ("fsync", "replace", "open")

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if threading.current_thread() is threading.main_thread() or not failing:
                return call(*arguments, **options)
            count += 1
            if count == failing or (on and count > failing):
                raise OSError(number, os.strerror(number), None)
            return call(*arguments, **options)

        return counting

    for name in names:
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    failures, total = 0, 0
    for on in (False, True):
        for attempt in range(1, 200):
            before = there(path)
            count, failing = 0, attempt
            futures = [writes.add(f"{on}{attempt}", png(attempt)), *([writes.remove(next(iter(before)))] if before else [])]
            outcomes = [future.exception(60) for future in futures]
            reached, failing = count >= attempt, 0
            total += 1
            after = there(path)
            if any(outcomes):
                failures += 1
                assert all(isinstance(outcome, IndexFormatError | UploadError | None) for outcome in outcomes), outcomes
                assert all("\n" not in str(outcome) for outcome in outcomes)
            for future, outcome in zip(futures, outcomes, strict=True):
                if outcome is None:
                    assert (future.result().id in after) == (future is futures[0])
            writes.add("next", png(500 + attempt), replace=True).result(60)
            found = there(path)
            assert found["next"][1] == content_of(png(500 + attempt))
            assert {content for _, content in found.values()} <= uploads(tmp_path)
            if not reached:
                break
        assert not reached
    assert failures > total // 2
    writes.close()
    print(f"{failures} of {total} groups failed")


def test_a_disk_that_is_full(path: Path, engine: RetrievalEngine, photos: Photos) -> None:
    """As the kernel has it: a limit of file sizes."""
    writes, limits = Writes(path, engine, photos), resource.getrlimit(resource.RLIMIT_FSIZE)
    writes.add("a", png(1)).result(60)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(IndexFormatError, match=r"cannot be written \(File too large\); raise the limit") as failure:
            writes.update("a", {"text": "x" * 1000}).result(60)
        assert isinstance(failure.value.__cause__, OSError)
        noise = encoded(Image.effect_noise((40, 40), 50), "PNG")
        with pytest.raises(UploadError, match=r"cannot be written \(File too large\)"):
            writes.add("b", noise).result(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(there(path)) == ["a"]
    writes.add("b", png(2)).result(60)
    assert list(there(path)) == ["a", "b"]
    writes.close()


def test_what_is_no_index_is_told_in_one_line(engine: RetrievalEngine, tmp_path: Path) -> None:
    for folder in ("gone", "empty", "file"):
        place = tmp_path / folder
        {"empty": place.mkdir, "file": place.touch}.get(folder, lambda: None)()
        writes = Writes(place, engine)
        with pytest.raises(IndexFormatError, match="no index here"):
            writes.remove("a").result(60)
        writes.close()


def test_a_folder_without_permission_is_told_in_one_line(engine: RetrievalEngine, path: Path) -> None:
    for mode in (0o500, 0o000):
        path.chmod(mode)
        with enforced_permissions():
            writes = Writes(path, engine)
            try:
                with pytest.raises(IndexFormatError, match="ermission denied"):
                    writes.add("a", png(1)).result(60)
            finally:
                path.chmod(0o700)
            writes.close()


def test_an_index_of_another_model_is_refused(writes: Writes, path: Path, make_foreign: Callable[[Path], None]) -> None:
    writes.add("a", png(1)).result(60)
    aside = path.rename(path.with_name("aside"))
    make_foreign(path)
    for _ in range(2):
        with pytest.raises(IndexFormatError, match="was made with model"):
            writes.add("b", png(2)).result(60)
    shutil.rmtree(path)
    with pytest.raises(IndexFormatError, match="no index here"):
        writes.add("b", png(2)).result(60)
    aside.rename(path)
    writes.add("b", png(2)).result(60)
    assert list(there(path)) == ["a", "b"]


@pytest.fixture
def make_foreign() -> Callable[[Path], None]:
    def make(path: Path) -> None:
        GalleryIndex(model_hash="m" * 32, target_shape=(3, 8), image_shape=(16, 12), image_storage="f16").save(path)

    return make


def test_an_index_is_made_where_there_is_none(engine: RetrievalEngine, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "index"
    made: list[bool] = []
    threads = [threading.Thread(target=lambda: made.append(make_index(engine.bundle, path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    engine.load_index(path)
    assert len(engine.index) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(IndexConflictError, match="holds other things"):
        make_index(engine.bundle, tmp_path / "other")
    with pytest.raises(IndexFormatError, match="cannot be written"):
        make_index(engine.bundle, tmp_path / "other" / "file" / "index")


def start_worker(bundle: Path, index: Path, name: str, count: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "tests"), str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "support.write_workers", str(bundle), str(index), name, str(count)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_processes_write_to_one_index(bundle_path: Path, path: Path, engine: RetrievalEngine, killed: bool) -> None:
    """Each has a `Writes` of its own; whatever becomes of one, what was confirmed is there, once, and the others go on."""
    count, names = int(os.environ.get("DQE_WRITES", "200")), ("a", "b", "c", "d")
    workers = {name: start_worker(bundle_path, path, name, count) for name in names}
    confirmed: dict[str, list[str]] = {name: [] for name in names}
    try:
        for worker in workers.values():
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()

        def read(name: str, worker: subprocess.Popen[str]) -> None:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.endswith("\n"):
                    confirmed[name].append(line.strip())
                if killed and name == "b" and len(confirmed[name]) == count // 4:
                    worker.send_signal(signal.SIGKILL)

        readers = [threading.Thread(target=read, args=pair) for pair in workers.items()]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(300)
        codes = {name: worker.wait(60) for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    assert codes == {name: -signal.SIGKILL if killed and name == "b" else 0 for name in names}
    found = there(path)
    with GalleryIndex.load(path) as index:
        assert len(index.ids) == len(set(index.ids))
    for name in names:
        assert len(set(confirmed[name])) == len(confirmed[name])
        assert set(confirmed[name]) <= set(found)
        if not (killed and name == "b"):
            assert len(confirmed[name]) == count
    assert all(found[id][0] == {"by": id[0], "n": int(id[2:])} for id in found)
    photos = Photos([], Path(f"{path}.uploads"))
    assert all(photos.has_upload(content) for _, content in found.values())
    writes = Writes(path, engine, photos)
    writes.add("after", png(999)).result(60)
    assert len(there(path)) == len(found) + 1
    writes.close()
