"""Images of items: found by content and by id, never outside their folders; thumbnails of whatever lies there."""

from __future__ import annotations

import contextlib
import io
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.hostile_images import encoded, mutated, ordinary_images
from support.samples import noise_image

from dqe_engine.errors import InputError
from dqe_engine.image_policy import ImagePolicy
from dqe_engine.server import photos as photos_module
from dqe_engine.server.photos import SIZES, NoPhotoError, Photos, UploadError, content_of
from dqe_engine.server.uploads import MARKER, Uploads

HOSTILE_IDS = (
    "", ".", "..", "/", "../secret.png", "../../etc/passwd", "/etc/passwd", "a/../b.png", "a/../../secret.png", "./b.png", "a//b.png",
    "a/b.png/", "b.png/", "b.png\0", "\0", "a\0/b.png", "\\", "..\\secret.png", "C:", "C:\\b.png", "C:/b.png", "x" * 5000,
    "a/" * 2500 + "b.png", "x" * 300, "\ud800", "b\udcff.png", "é" * 200, "a", "link.png", "linked/secret.png", "pipe.png", "b.png.",
    "B.PNG", "b.png ", " b.png", "~", "%2e%2e/secret.png", "\u202eb.png", "dev/null", "/dev/zero", "a/.", "a/..",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos `b.png` and `a/b.png`, beside them links, a pipe, and a secret above them."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    noise_image(1).save(folder / "b.png")
    noise_image(2).save(folder / "a" / "b.png")
    noise_image(3).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    return folder


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_an_upload_comes_before_the_folder_and_the_longest_prefix_wins(folder: Path, tmp_path: Path) -> None:
    photos = Photos([("", folder), ("a/", folder.parent)], tmp_path / "uploads")
    data = encoded(noise_image(9), "PNG")
    content = photos.store(data)
    assert photos.original("b.png", content).data == data
    assert photos.original("nowhere", content).data == data
    assert photos.original("b.png", content_of(b"other")).data == (folder / "b.png").read_bytes()
    assert photos.original("b.png", "pixels:" + content).data == (folder / "b.png").read_bytes()
    assert photos.original("a/secret.png", None).data == (tmp_path / "secret.png").read_bytes()
    with pytest.raises(NoPhotoError, match=r"^'a/b.png': no image of this item is at hand$"):  # of the longest prefix alone
        photos.original("a/b.png", None)


def test_folders_of_the_same_prefix_are_asked_in_their_order(folder: Path) -> None:
    photos = Photos([("x/", folder / "a"), ("x/", folder), ("x/", folder.parent)])
    assert photos.original("x/b.png", None).data == (folder / "a" / "b.png").read_bytes()
    assert photos.original("x/secret.png", None).data == (folder.parent / "secret.png").read_bytes()


@pytest.mark.parametrize("prefix", ["", "x/", "x"])
def test_no_id_leads_out_of_the_folder(folder: Path, prefix: str) -> None:
    photos = Photos([(prefix, folder)])
    assert photos.original(f"{prefix}a/b.png", None).data == (folder / "a" / "b.png").read_bytes()
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


def test_a_name_may_hold_whatever_a_file_name_may(folder: Path) -> None:
    names = ["a\\b.png", "C:", "ü ß 🙂.png", "a\nb.png", ".hidden", "...", "b.png.", "-rf"]
    for name in names:
        (folder / name).write_bytes(name.encode())
    photos = Photos([("", folder)])
    assert [photos.original(name, None).data for name in names] == [name.encode() for name in names]


def test_large_and_unreadable_files_are_no_images(folder: Path) -> None:
    (folder / "large.png").write_bytes(b"x" * 101)
    (folder / "fits.png").write_bytes(b"x" * 100)
    photos = Photos([("", folder), ("gone/", folder / "nowhere")], policy=ImagePolicy(max_bytes=100))
    assert len(photos.original("fits.png", None).data) == 100
    for id in ("large.png", "gone/b.png"):
        with pytest.raises(NoPhotoError):
            photos.original(id, None)


@pytest.mark.parametrize("size", SIZES)
def test_thumbnails_fit_their_size(folder: Path, size: int) -> None:
    photos = Photos([("", folder)])
    for shape in ((2000, 1000), (1000, 2000), (641, 639), (10, 7), (4000, 1), (1, 4000), (1, 1)):
        noise_image(1, shape).save(folder / "c.png")
        made = photos.thumbnail("c.png", None, size)
        assert made.media_type == "image/jpeg"
        scale = min(1.0, size / max(shape))
        assert opened(made.data).size == tuple(max(1, round(side * scale)) for side in shape)
        assert made.etag == photos.etag("c.png", None, size)


@pytest.mark.parametrize("size", [0, 1, 161, 10**30, "320", True])
def test_other_sizes_are_refused(folder: Path, size: int) -> None:
    with pytest.raises(InputError, match="size: expected one of 160, 320, 640"):
        Photos([("", folder)]).thumbnail("b.png", None, size)


def test_a_thumbnail_is_upright_and_has_no_metadata(folder: Path) -> None:
    upright = noise_image(4, (400, 300))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "secret maker"
    for kind, options in (("JPEG", {"quality": 95, "comment": b"secret comment"}), ("PNG", {}), ("WEBP", {"lossless": True})):
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        (folder / "turned").write_bytes(encoded(turned, kind, exif=exif, icc_profile=b"secret profile", xmp=b"secret xmp", **options))
        made = Photos([("", folder)]).thumbnail("turned", None, 320)
        assert b"secret" not in made.data
        image = opened(made.data)
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert image.size == (320, 240)
        wanted = np.asarray(upright.resize((320, 240)), np.int16)
        assert np.abs(np.asarray(image, np.int16) - wanted).mean() < 8


def test_what_shines_through_stays(folder: Path) -> None:
    see_through = noise_image(5, (900, 600)).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize((900, 600)))
    palette = Image.new("P", (50, 50), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    photos = Photos([("", folder)])
    for name, image, options in (
        ("rgba.png", see_through, {}), ("la.png", see_through.convert("LA"), {}), ("a.webp", see_through, {}),
        ("p.gif", palette, {"transparency": 1}), ("p.png", palette, {"transparency": 1}),
    ):  # fmt: skip
        image.save(folder / name, **options)
        made = photos.thumbnail(name, None, 160)
        assert made.media_type == "image/webp", name
        found = opened(made.data)
        assert found.mode == "RGBA"
        assert not found.info.keys() - {"loop", "background", "timestamp", "duration"}
        assert found.getchannel("A").getextrema()[0] < 5
    see_through.putalpha(255)
    see_through.save(folder / "opaque.png")
    assert photos.thumbnail("opaque.png", None, 160).media_type == "image/jpeg"


def test_png_where_pillow_has_no_webp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGBA", (9, 9)).save(folder / "clear.png")
    monkeypatch.setattr(photos_module.features, "check", lambda name: False)
    made = Photos([("", folder)]).thumbnail("clear.png", None, 160)
    assert (made.media_type, opened(made.data).format) == ("image/png", "PNG")


def test_the_policy_holds(folder: Path) -> None:
    photos = Photos([("", folder)], policy=ImagePolicy(formats=("JPEG",), max_pixels=100))
    with pytest.raises(NoPhotoError, match=r"^'b.png': <\d+ bytes>: not an image of an accepted format; save it as JPEG$"):
        photos.thumbnail("b.png", None, 160)
    noise_image(1).save(folder / "c.jpg")
    with pytest.raises(NoPhotoError, match="more than the limit of 100; scale it down first"):
        photos.thumbnail("c.jpg", None, 160)


def test_a_file_that_changes_has_another_etag(folder: Path) -> None:
    photos = Photos([("", folder)])
    before = photos.thumbnail("b.png", None, 160)
    assert photos.thumbnail("b.png", None, 160) is before
    noise_image(77).save(folder / "b.png")
    after = photos.thumbnail("b.png", None, 160)
    assert after.etag != before.etag
    assert after.data != before.data


def test_a_file_that_changes_while_it_is_read_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, reads = Photos([("", folder)]), 0
    read = photos_module._read

    def changing(place: photos_module._Place) -> bytes | None:
        nonlocal reads
        reads += 1
        if reads <= changes:
            with open(folder / "b.png", "r+b") as stream:
                stream.truncate(random.randrange(100))
        return read(place)

    monkeypatch.setattr(photos_module, "_read", changing)
    changes = 1
    assert photos.original("b.png", None).data == (folder / "b.png").read_bytes()
    reads, changes = 0, 100
    with pytest.raises(NoPhotoError, match="is being written; ask again"):
        photos.original("b.png", None)
    assert reads < 10


def test_the_cache_is_bounded_and_the_least_used_goes_first(folder: Path) -> None:
    for seed in range(8):
        noise_image(seed, (300, 300)).save(folder / f"{seed}.png")
    sizes = [len(Photos([("", folder)]).thumbnail(f"{seed}.png", None, 160).data) + 512 for seed in range(8)]
    photos = Photos([("", folder)], cache_bytes=sum(sizes[:4]) + min(sizes) // 2)
    first = [photos.thumbnail(f"{seed}.png", None, 160) for seed in range(4)]
    assert photos.cached_bytes == sum(sizes[:4])
    assert photos.thumbnail("0.png", None, 160) is first[0]
    for seed in range(4, 7):
        photos.thumbnail(f"{seed}.png", None, 160)
        photos.thumbnail("0.png", None, 160)
        assert photos.cached_bytes <= sum(sizes[:4]) + min(sizes)
    assert photos.thumbnail("0.png", None, 160) is first[0]
    assert photos.thumbnail("1.png", None, 160) is not first[1]
    assert Photos([("", folder)], cache_bytes=0).thumbnail("0.png", None, 160) == first[0]


def test_what_many_ask_for_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, made, going_on = Photos([("", folder)]), [], threading.Event()
    render: Callable[..., tuple[bytes, str]] = photos_module._rendered

    def slowly(*arguments: object) -> tuple[bytes, str]:
        made.append(arguments)
        assert going_on.wait(60)
        return render(*arguments)

    monkeypatch.setattr(photos_module, "_rendered", slowly)
    found: list[object] = []

    def ask(id: str) -> None:
        try:
            found.append(photos.thumbnail(id, None, 160))
        except NoPhotoError as error:
            found.append(str(error))

    (folder / "bad.png").write_bytes((folder / "b.png").read_bytes()[:90])
    for id in ("b.png", "bad.png"):
        going_on.clear()
        threads = [threading.Thread(target=ask, args=(id,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        while not made:
            pass
        while sum(thread.is_alive() for thread in threads) < 12:
            pass
        going_on.set()
        for thread in threads:
            thread.join(60)
        assert len(found) == 12
        assert len(made) == 1
        assert len(set(map(id_of, found))) == 1
        made.clear()
        found.clear()
    assert not photos._flights


def id_of(value: object) -> object:
    return value if isinstance(value, str) else id(value)


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
    with pytest.raises(UploadError, match="no folder of uploads is configured"):
        Photos([]).store(b"x")


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_images_are_no_photos_or_thumbnails(tmp_path: Path) -> None:
    """Nothing else comes of them, and nothing stays behind. More with DQE_FUZZ."""
    rng, originals = np.random.default_rng(3), ordinary_images()
    photos = Photos([("", tmp_path)], policy=ImagePolicy(max_bytes=1 << 20, max_pixels=1_000_000), cache_bytes=1 << 20)
    rounds, before, outcomes = int(os.environ.get("DQE_FUZZ", "400")), 0, Counter[str]()
    for number in range(rounds):
        (tmp_path / "photo").write_bytes(mutated(originals[number % len(originals)], rng))
        try:
            made = photos.thumbnail("photo", None, SIZES[number % 3])
            outcomes[made.media_type] += 1
            assert max(opened(made.data).size) <= SIZES[number % 3]
        except NoPhotoError:
            outcomes["no photo"] += 1
        assert photos.cached_bytes <= 1 << 20
        if number == rounds // 4:
            before = memory()
    assert min(outcomes[kind] for kind in ("image/jpeg", "image/webp", "no photo")) > rounds // 400, outcomes
    assert memory() - before < 48 << 20


def test_a_damaged_image_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, calls = Photos([("", folder)]), 0
    (folder / "bad.png").write_bytes((folder / "b.png").read_bytes()[:90])
    render: Callable[..., tuple[bytes, str]] = photos_module._rendered

    def counting(*arguments: object) -> tuple[bytes, str]:
        nonlocal calls
        calls += 1
        return render(*arguments)

    monkeypatch.setattr(photos_module, "_rendered", counting)
    for _ in range(3):
        with pytest.raises(NoPhotoError, match=r"^'bad.png': <90 bytes>: damaged or truncated image"):
            photos.thumbnail("bad.png", None, 160)
    assert calls == 1
    assert photos.original("bad.png", None).data
    noise_image(5).save(folder / "bad.png")
    assert photos.thumbnail("bad.png", None, 160).media_type == "image/jpeg"


def test_files_that_are_replaced_all_the_time(folder: Path) -> None:
    """Written over in place, renamed over, removed, made a link or a pipe, while others read: what comes is one of the images, or none."""
    images = [encoded(noise_image(seed, (60 + seed, 40)), "PNG") for seed in range(4)]
    secret = (folder.parent / "secret.png").read_bytes()
    photos, over = Photos([("", folder)], cache_bytes=0), threading.Event()
    found: Counter[str] = Counter()

    def change() -> None:
        rng, n = random.Random(1), 0
        while not over.is_set():
            n += 1
            with contextlib.suppress(OSError):
                match rng.randrange(6):
                    case 0:
                        with open(os.open(folder / "x.png", os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "r+b", buffering=0) as stream:
                            stream.write(images[n % 4])
                            stream.truncate(len(images[n % 4]))
                    case 1 | 2:
                        (folder / "new").write_bytes(images[n % 4])
                        (folder / "new").rename(folder / "x.png")
                    case 3:
                        (folder / "x.png").unlink()
                    case 4:
                        (folder / "new").symlink_to("../secret.png")
                        (folder / "new").rename(folder / "x.png")
                    case _:
                        os.mkfifo(folder / "new")
                        (folder / "new").rename(folder / "x.png")

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
