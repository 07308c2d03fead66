"""Photo folders indexed beside a server: bad files, other writers, signals and kills."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.hostile_images import encoded
from support.samples import noise_image

from dqe_engine.engine import RetrievalEngine
from dqe_engine.files import directory_lock
from dqe_engine.index import GalleryIndex
from dqe_engine.server import background
from dqe_engine.server.background import FolderJob, index_folder
from dqe_engine.server.photos import Photos, content_of
from dqe_engine.server.progress import Progress, read_progress, write_progress
from dqe_engine.server.uploads import sweep_uploads
from dqe_engine.server.writes import Writes, make_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty photos, a quarter of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for seed in range(40):
        noise_image(seed).save(folder / ("sub" if seed % 4 == 0 else "") / f"{seed:02}.png")
    return folder


def job_of(bundle: Path, place: Path, *folders: tuple[str, Path], **options: Any) -> FolderJob:
    given = {"index": place / "index", "state_file": place / "state.json", "provider": "cpu", "threads": 1, **options}
    return FolderJob(bundle=bundle, folders=folders, **given)


@pytest.fixture
def run(bundle_path: Path, tmp_path: Path) -> Callable[..., Progress]:
    def run(*folders: tuple[str, Path], **options: Any) -> Progress:
        ended = index_folder(job_of(bundle_path, tmp_path, *folders, **options))
        assert read_progress(tmp_path / "state.json") == ended
        return ended

    return run


def contents(tmp_path: Path) -> dict[str, str | None]:
    with GalleryIndex.load(tmp_path / "index", verify=True) as index:
        return {item.id: item.content for item in index}


def test_folders_are_indexed_and_followed(run: Callable[..., Progress], folder: Path, tmp_path: Path) -> None:
    ended = run(("", folder / "sub"), ("all/", folder))
    assert (ended.state, ended.message) == ("done", "50 images indexed, 0 were there")
    found = contents(tmp_path)
    assert len(found) == 50
    assert found["all/sub/00.png"] == found["00.png"] == content_of((folder / "sub" / "00.png").read_bytes())
    before = GalleryIndex.load(tmp_path / "index").stats().revision
    assert run(("", folder / "sub"), ("all/", folder)).message == "0 images indexed, 50 were there"
    assert GalleryIndex.load(tmp_path / "index").stats().revision == before
    noise_image(99).save(folder / "01.png")
    (folder / "02.png").unlink()
    assert run(("", folder / "sub"), ("all/", folder)).message == "1 images indexed, 48 were there"
    assert contents(tmp_path)["all/01.png"] == content_of((folder / "01.png").read_bytes())
    assert "all/02.png" in contents(tmp_path)


def test_an_index_is_there_at_once(run: Callable[..., Progress], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run(("", tmp_path / "empty")).message == "0 images indexed, 0 were there"
    assert contents(tmp_path) == {}
    assert run().state == "done"


def test_what_is_no_photo_is_counted(run: Callable[..., Progress], folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.png").write_bytes(encoded(noise_image(1), "PNG")[:90])
    (folder / "text.jpg").write_text("no image")
    (folder / "pipe").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "outside").mkdir()
    noise_image(7).save(tmp_path / "outside" / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (folder / "linked").symlink_to(tmp_path / "outside")
    os.close(os.open(os.path.join(os.fsencode(folder), b"\xff.png"), os.O_CREAT | os.O_WRONLY))
    (folder / "again").mkdir()
    ended = run(("", folder), ("sub/", folder / "sub"))
    assert ended.state == "done"
    assert ended.skipped == {
        "not an image": 2, "damaged": 1, "not readable": 1, "links to files (not followed)": 1, "linked folders (not followed)": 1,
        "with an id that is not Unicode": 1, "of the same id as another": 10,
    }  # fmt: skip
    assert ended.message.startswith("40 images indexed, 0 were there, 17 left out (1 damaged, 1 linked folders (not followed), ")
    assert len(contents(tmp_path)) == 40


def test_failures_are_told_in_one_line(run: Callable[..., Progress], bundle_path: Path, folder: Path, tmp_path: Path) -> None:
    assert run(("", tmp_path / "nowhere")).message == (
        f"{tmp_path / 'nowhere'}: not a folder of images; pass a folder, a mapping from id to image, or several paths"
    )
    ended = index_folder(job_of(tmp_path / "nowhere", tmp_path, ("", folder)))
    assert ended.state == "failed"
    assert "\n" not in ended.message
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").touch()
    ended = index_folder(job_of(bundle_path, tmp_path, ("", folder), index=tmp_path / "documents"))
    assert "holds other things (letter) and no index" in ended.message
    ended = index_folder(job_of(bundle_path, tmp_path, state_file=tmp_path / "documents" / "letter" / "state.json"))  # the news are lost
    assert ended.state == "done"


def test_an_upload_stays(run: Callable[..., Progress], folder: Path, engine: RetrievalEngine, tmp_path: Path) -> None:
    make_index(engine.bundle, tmp_path / "index")
    writes = Writes(tmp_path / "index", engine, Photos([], tmp_path / "uploads"))
    writes.add("01.png", encoded(noise_image(70), "PNG"), {"by": "hand"}).result(60)
    ended = run(("", folder), uploads=tmp_path / "uploads")
    assert ended.message == "39 images indexed, 0 were there"
    assert contents(tmp_path)["01.png"] == content_of(encoded(noise_image(70), "PNG"))
    writes.close()
    assert sweep_uploads(tmp_path / "index", tmp_path / "uploads", older_than=-60) == 0


@pytest.mark.parametrize("image_storage", ["none", "f16", "f32"])
def test_rows_are_those_of_index_images(
    run: Callable[..., Progress], folder: Path, engine: RetrievalEngine, tmp_path: Path, image_storage: Any
) -> None:
    make_index(engine.bundle, tmp_path / "index", storage="f16", image_storage=image_storage)
    run(("", folder))
    engine.new_index(storage="f16", image_storage=image_storage)
    engine.index_images(folder)
    found = GalleryIndex.load(tmp_path / "index")
    assert set(found.ids) == set(engine.index.ids)
    for id in found.ids:
        assert abs(found.target_tokens(id) - engine.index.target_tokens(id)).max() < 1e-3
        if image_storage != "none":
            assert abs(found.image_tokens(id) - engine.index.image_tokens(id)).max() < 1e-2


def test_api_writes_get_in_between_and_win(
    run: Callable[..., Progress], folder: Path, engine: RetrievalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items that were changed since they were compared stay as they were left."""
    make_index(engine.bundle, tmp_path / "index")
    run(("", folder))
    noise_image(80).save(folder / "01.png")
    noise_image(81).save(folder / "02.png")
    noise_image(82).save(folder / "03.png")
    noise_image(83).save(folder / "new.png")
    writes = Writes(tmp_path / "index", engine)
    encode, calls = background._Work._encode, 0

    def interfering(work: Any, pixels: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            writes.add("01.png", encoded(noise_image(90), "PNG"), replace=True).result(60)
            writes.remove("02.png").result(60)
            writes.update("03.png", {"colour": "red"}).result(60)
            writes.add("new.png", encoded(noise_image(91), "PNG")).result(60)
            writes.add("other", encoded(noise_image(92), "PNG")).result(60)
        return encode(work, pixels)

    monkeypatch.setattr(background._Work, "_encode", interfering)
    assert run(("", folder)).message == "1 images indexed, 37 were there"
    found = contents(tmp_path)
    assert found["01.png"] == content_of(encoded(noise_image(90), "PNG"))
    assert "02.png" not in found
    assert found["03.png"] == content_of((folder / "03.png").read_bytes())
    assert GalleryIndex.load(tmp_path / "index").get(["03.png"])[0].metadata == {"colour": "red"}
    assert found["new.png"] == content_of(encoded(noise_image(91), "PNG"))
    assert "other" in found
    writes.close()


def test_another_writer_that_knows_no_lock(
    run: Callable[..., Progress], folder: Path, engine: RetrievalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, foreign = GalleryIndex.save, 0

    def after_another(index: GalleryIndex, *arguments: Any, **options: Any) -> None:
        nonlocal foreign
        if len(index) and foreign < 3:
            foreign += 1
            other = GalleryIndex.load(tmp_path / "index")
            tokens = engine.encode_images([noise_image(foreign)])
            other.add([f"foreign{foreign}"], tokens.target_tokens, tokens.image_tokens)
            save(other, tmp_path / "index")
        save(index, *arguments, **options)

    monkeypatch.setattr(GalleryIndex, "save", after_another)
    assert run(("", folder), save_every=16).state == "done"
    assert len(contents(tmp_path)) == 43


def test_saves_come_as_often_as_was_said(run: Callable[..., Progress], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    save = GalleryIndex.save

    def counting(index: GalleryIndex, *arguments: Any, **options: Any) -> None:
        save(index, *arguments, **options)
        sizes.append(len(index))

    monkeypatch.setattr(GalleryIndex, "save", counting)
    run(("a/", folder), save_every=16)
    assert sizes == [0, 16, 32, 40]
    sizes.clear()
    run(("b/", folder), save_every=1000)
    assert sizes == [80]
    sizes.clear()
    run(("c/", folder), save_every=1000, save_seconds=0.0)
    assert sizes == [96, 112, 120]


def test_a_disk_that_is_full_ends_the_run_and_the_next_goes_on(run: Callable[..., Progress], folder: Path, tmp_path: Path) -> None:
    """As the kernel has it: a limit of file sizes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        ended = run(("", folder), save_every=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.state == "failed"
    assert "cannot be written (File too large); raise the limit" in ended.message
    before = len(contents(tmp_path))
    assert before < 40
    assert run(("", folder)).message == f"{40 - before} images indexed, {before} were there"


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(
    run: Callable[..., Progress], bundle_path: Path, engine: RetrievalEngine, tmp_path: Path, how: signal.Signals
) -> None:
    """A process that waits for the lock is stopped, too, and its state is told from one that is alive."""
    folder = tmp_path / "many"
    folder.mkdir()
    for seed in range(300):
        noise_image(seed).save(folder / f"{seed:03}.png")
    state = tmp_path / "state.json"
    process = subprocess.Popen(job_of(bundle_path, tmp_path, ("", folder)).command())
    try:
        wait_for(lambda: (tmp_path / "index" / "manifest.json").exists())
        engine.load_index(tmp_path / "index")
        wait_for(lambda: engine.index.refresh() or process.poll() is not None)
        with directory_lock(tmp_path / "index"):
            engine.index.refresh()
            before = len(engine.index)
            now = read_progress(state)
            assert now is not None
            assert now.pid == process.pid
            assert now.state in ("indexing", "done")
            process.send_signal(how)
            code = process.wait(60)
    finally:
        process.kill()
        process.wait()
    now = read_progress(state)
    assert now is not None
    if before < 300:
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 1)
        assert now.state == "failed"
        said = "indexing ended unexpectedly after" if how == signal.SIGKILL else "stopped after"
        assert now.message.startswith(said)
    assert len(contents(tmp_path)) == before
    assert run(("", folder)).message == f"{300 - before} images indexed, {before} were there"
    assert len(contents(tmp_path)) == 300


def test_progress_of_a_process_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    assert read_progress(file) is None
    write_progress(file, Progress(state="indexing", done=3, total=9, born="nobody"))
    found = read_progress(file)
    assert found is not None
    assert (found.state, found.done, found.total) == ("failed", 3, 9)
    assert found.message == "indexing ended unexpectedly after 3 of 9 images; it goes on at the next start"
    write_progress(file, Progress(state="done", born="nobody"))
    assert read_progress(file) == msgspec.json.decode(file.read_bytes(), type=Progress)
    for damaged in (b"", b"{", b"[]", b'{"state": "odd"}', b"\xff", b"[" * 100_000):
        file.write_bytes(damaged)
        assert read_progress(file) is None


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    program = (
        "import os, sys; from pathlib import Path; from dqe_engine.server.progress import *; "
        "write_progress(Path(sys.argv[1]), Progress(state='indexing', born=born(os.getpid()))); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(file)], stdin=subprocess.PIPE)
    wait_for(lambda: read_progress(file))
    assert read_progress(file).state == "indexing"  # type: ignore[union-attr]
    process.stdin.close()  # type: ignore[union-attr]
    wait_for(lambda: read_progress(file).state == "failed")  # type: ignore[union-attr]
    process.wait()


def test_the_news_are_never_half_written(tmp_path: Path) -> None:
    file, over = tmp_path / "state.json", threading.Event()

    def write() -> None:
        n = 0
        while not over.is_set():
            n += 1
            write_progress(file, Progress(state="done", done=n, message="x" * (n % 5000)))

    thread = threading.Thread(target=write)
    thread.start()
    wait_for(file.exists)
    found = [read_progress(file) for _ in range(500)]
    over.set()
    thread.join()
    assert all(found)
    assert [progress.done for progress in found if progress] == sorted(progress.done for progress in found if progress)
