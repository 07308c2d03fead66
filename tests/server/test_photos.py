"""Images of items: found by content and by id, never outside their folders, whatever is done to the files meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from support.hostile_images import encoded
from support.samples import noise_image

from dqe_engine.image_policy import ImagePolicy
from dqe_engine.server import photos as photos_module
from dqe_engine.server.photos import NoPhotoError, Photos, content_of

HOSTILE_IDS = (
    "", ".", "..", "/", "../secret.png", "../../etc/passwd", "/etc/passwd", "a/../b.png", "a/../../secret.png", "./b.png", "a//b.png",
    "a/b.png/", "b.png/", "b.png\0", "\0", "a\0/b.png", "\\", "..\\secret.png", "C:", "C:\\b.png", "C:/b.png", "x" * 5000,
    "a/" * 2500 + "b.png", "x" * 300, "\ud800", "b\udcff.png", "é" * 200, "a", "link.png", "linked/secret.png", "pipe.png", "b.png.",
    "B.PNG", "b.png ", " b.png", "~", "%2e%2e/secret.png", "\u202eb.png", "dev/null", "/dev/zero", "a/.", "a/..",
)  # fmt: skip


def test_an_upload_comes_before_the_folder_and_the_longest_prefix_wins(photo_folder: Path, tmp_path: Path) -> None:
    photos = Photos([("", photo_folder), ("a/", photo_folder.parent)], tmp_path / "uploads")
    data = encoded(noise_image(9), "PNG")
    content = photos.store(data)
    assert photos.original("b.png", content).data == data
    assert photos.original("nowhere", content).data == data
    assert photos.original("b.png", content_of(b"other")).data == (photo_folder / "b.png").read_bytes()
    assert photos.original("b.png", "pixels:" + content).data == (photo_folder / "b.png").read_bytes()
    assert photos.original("a/secret.png", None).data == (tmp_path / "secret.png").read_bytes()
    with pytest.raises(
        NoPhotoError, match=r"^'a/b.png': the server has no image of this item; start it with --images FOLDER, or upload the image$"
    ):  # of the longest prefix alone
        photos.original("a/b.png", None)


def test_folders_of_the_same_prefix_are_asked_in_their_order(photo_folder: Path) -> None:
    photos = Photos([("x/", photo_folder / "a"), ("x/", photo_folder), ("x/", photo_folder.parent)])
    assert photos.original("x/b.png", None).data == (photo_folder / "a" / "b.png").read_bytes()
    assert photos.original("x/secret.png", None).data == (photo_folder.parent / "secret.png").read_bytes()


@pytest.mark.parametrize("prefix", ["", "x/", "x"])
def test_no_id_leads_out_of_the_folder(photo_folder: Path, prefix: str) -> None:
    photos = Photos([(prefix, photo_folder)])
    assert photos.original(f"{prefix}a/b.png", None).data == (photo_folder / "a" / "b.png").read_bytes()
    for id in HOSTILE_IDS:
        for call in (
            photos.original,
            lambda id, content: photos.thumbnail(id, content, 160),
            lambda id, content: photos.etag(id, content, 160),
        ):
            with pytest.raises(NoPhotoError) as failure:
                call(prefix + id, None)
            assert len(str(failure.value)) < 1500
            assert "\n" not in str(failure.value)


def test_a_name_may_hold_whatever_a_file_name_may(photo_folder: Path) -> None:
    names = ["a\\b.png", "C:", "ü ß 🙂.png", "a\nb.png", ".hidden", "...", "b.png.", "-rf"]
    for name in names:
        (photo_folder / name).write_bytes(name.encode())
    photos = Photos([("", photo_folder)])
    assert [photos.original(name, None).data for name in names] == [name.encode() for name in names]


def test_large_and_unreadable_files_are_no_images(photo_folder: Path) -> None:
    (photo_folder / "large.png").write_bytes(b"x" * 101)
    (photo_folder / "fits.png").write_bytes(b"x" * 100)
    photos = Photos([("", photo_folder), ("gone/", photo_folder / "nowhere")], policy=ImagePolicy(max_bytes=100))
    assert len(photos.original("fits.png", None).data) == 100
    for id in ("large.png", "gone/b.png"):
        with pytest.raises(NoPhotoError):
            photos.original(id, None)


def test_the_policy_holds(photo_folder: Path) -> None:
    photos = Photos([("", photo_folder)], policy=ImagePolicy(formats=("JPEG",), max_pixels=100))
    with pytest.raises(NoPhotoError, match=r"^'b.png': <\d+ bytes>: not an image of an accepted format; save it as JPEG$"):
        photos.thumbnail("b.png", None, 160)
    noise_image(1).save(photo_folder / "c.jpg")
    with pytest.raises(NoPhotoError, match="more than the limit of 100; scale it down first"):
        photos.thumbnail("c.jpg", None, 160)


def test_a_file_that_changes_has_another_etag(photo_folder: Path) -> None:
    photos = Photos([("", photo_folder)])
    before = photos.thumbnail("b.png", None, 160)
    assert photos.thumbnail("b.png", None, 160) is before
    noise_image(77).save(photo_folder / "b.png")
    after = photos.thumbnail("b.png", None, 160)
    assert after.etag != before.etag
    assert after.data != before.data


def test_a_file_that_changes_while_it_is_read_is_read_again(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, reads = Photos([("", photo_folder)]), 0
    read = photos_module._read

    def changing(place: photos_module._Place) -> bytes | None:
        nonlocal reads
        reads += 1
        if reads <= changes:
            with open(photo_folder / "b.png", "r+b") as stream:
                stream.truncate(random.randrange(100))
        return read(place)

    monkeypatch.setattr(photos_module, "_read", changing)
    changes = 1
    assert photos.original("b.png", None).data == (photo_folder / "b.png").read_bytes()
    reads, changes = 0, 100
    with pytest.raises(NoPhotoError, match="is being written; ask again"):
        photos.original("b.png", None)
    assert reads < 10


def test_files_that_are_replaced_all_the_time(photo_folder: Path) -> None:
    """Written over in place, renamed over, removed, made a link or a pipe, while others read: what comes is one of the images, or none."""
    images = [encoded(noise_image(seed, (60 + seed, 40)), "PNG") for seed in range(4)]
    secret = (photo_folder.parent / "secret.png").read_bytes()
    photos, over = Photos([("", photo_folder)], cache_bytes=0), threading.Event()
    found: Counter[str] = Counter()

    def change() -> None:
        rng, n = random.Random(1), 0
        while not over.is_set():
            n += 1
            with contextlib.suppress(OSError):
                match rng.randrange(6):
                    case 0:
                        with open(
                            os.open(photo_folder / "x.png", os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "r+b", buffering=0
                        ) as stream:
                            stream.write(images[n % 4])
                            stream.truncate(len(images[n % 4]))
                    case 1 | 2:
                        (photo_folder / "new").write_bytes(images[n % 4])
                        (photo_folder / "new").rename(photo_folder / "x.png")
                    case 3:
                        (photo_folder / "x.png").unlink()
                    case 4:
                        (photo_folder / "new").symlink_to("../secret.png")
                        (photo_folder / "new").rename(photo_folder / "x.png")
                    case _:
                        os.mkfifo(photo_folder / "new")
                        (photo_folder / "new").rename(photo_folder / "x.png")

    until = time.monotonic() + 60  # who writes may get no processor for a while

    def read() -> None:
        rounds = 0
        while rounds < 400 or (not (found["read"] and found["none"]) and time.monotonic() < until):
            rounds += 1
            try:
                original = photos.original("x.png", None)
                assert original.data != secret
                found["read"] += 1
                photos.thumbnail("x.png", None, 160)
                found["seen"] += 1
            except NoPhotoError:
                found["none"] += 1
            except BaseException as error:
                found[repr(error)] += 1

    threads = [threading.Thread(target=work) for work in (change, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    over.set()
    threads[0].join()
    assert set(found) <= {"read", "seen", "none"}, found
    assert found["read"]
