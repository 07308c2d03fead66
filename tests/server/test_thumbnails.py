"""Thumbnails of whatever lies in a folder of photos: their sizes, what stays of an image, what is kept, and what is made once."""

from __future__ import annotations

import io
import os
import threading
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
from dqe_engine.server.photos import SIZES, NoPhotoError, Photos


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("size", SIZES)
def test_thumbnails_fit_their_size(photo_folder: Path, size: int) -> None:
    photos = Photos([("", photo_folder)])
    for shape in ((2000, 1000), (1000, 2000), (641, 639), (10, 7), (4000, 1), (1, 4000), (1, 1)):
        noise_image(1, shape).save(photo_folder / "c.png")
        made = photos.thumbnail("c.png", None, size)
        assert made.media_type == "image/jpeg"
        scale = min(1.0, size / max(shape))
        assert opened(made.data).size == tuple(max(1, round(side * scale)) for side in shape)
        assert made.etag == photos.etag("c.png", None, size)


@pytest.mark.parametrize("size", [0, 1, 161, 10**30, "320", True])
def test_other_sizes_are_refused(photo_folder: Path, size: int) -> None:
    with pytest.raises(InputError, match="size: expected one of 160, 320, 640"):
        Photos([("", photo_folder)]).thumbnail("b.png", None, size)


def test_a_thumbnail_is_upright_and_has_no_metadata(photo_folder: Path) -> None:
    upright = noise_image(4, (400, 300))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "secret maker"
    for kind, options in (("JPEG", {"quality": 95, "comment": b"secret comment"}), ("PNG", {}), ("WEBP", {"lossless": True})):
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        (photo_folder / "turned").write_bytes(encoded(turned, kind, exif=exif, icc_profile=b"secret profile", xmp=b"secret xmp", **options))
        made = Photos([("", photo_folder)]).thumbnail("turned", None, 320)
        assert b"secret" not in made.data
        image = opened(made.data)
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert image.size == (320, 240)
        wanted = np.asarray(upright.resize((320, 240)), np.int16)
        assert np.abs(np.asarray(image, np.int16) - wanted).mean() < 8


def test_what_shines_through_stays(photo_folder: Path) -> None:
    see_through = noise_image(5, (900, 600)).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize((900, 600)))
    palette = Image.new("P", (50, 50), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    photos = Photos([("", photo_folder)])
    for name, image, options in (
        ("rgba.png", see_through, {}), ("la.png", see_through.convert("LA"), {}), ("a.webp", see_through, {}),
        ("p.gif", palette, {"transparency": 1}), ("p.png", palette, {"transparency": 1}),
    ):  # fmt: skip
        image.save(photo_folder / name, **options)
        made = photos.thumbnail(name, None, 160)
        assert made.media_type == "image/webp", name
        found = opened(made.data)
        assert found.mode == "RGBA"
        assert not found.info.keys() - {"loop", "background", "timestamp", "duration"}
        assert found.getchannel("A").getextrema()[0] < 5
    see_through.putalpha(255)
    see_through.save(photo_folder / "opaque.png")
    assert photos.thumbnail("opaque.png", None, 160).media_type == "image/jpeg"


def test_png_where_pillow_has_no_webp(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGBA", (9, 9)).save(photo_folder / "clear.png")
    monkeypatch.setattr(photos_module.features, "check", lambda name: False)
    made = Photos([("", photo_folder)]).thumbnail("clear.png", None, 160)
    assert (made.media_type, opened(made.data).format) == ("image/png", "PNG")


def test_the_cache_is_bounded_and_the_least_used_goes_first(photo_folder: Path) -> None:
    for seed in range(8):
        noise_image(seed, (300, 300)).save(photo_folder / f"{seed}.png")
    sizes = [len(Photos([("", photo_folder)]).thumbnail(f"{seed}.png", None, 160).data) + 512 for seed in range(8)]
    photos = Photos([("", photo_folder)], cache_bytes=sum(sizes[:4]) + min(sizes) // 2)
    first = [photos.thumbnail(f"{seed}.png", None, 160) for seed in range(4)]
    assert photos.cached_bytes == sum(sizes[:4])
    assert photos.thumbnail("0.png", None, 160) is first[0]
    for seed in range(4, 7):
        photos.thumbnail(f"{seed}.png", None, 160)
        photos.thumbnail("0.png", None, 160)
        assert photos.cached_bytes <= sum(sizes[:4]) + min(sizes)
    assert photos.thumbnail("0.png", None, 160) is first[0]
    assert photos.thumbnail("1.png", None, 160) is not first[1]
    assert Photos([("", photo_folder)], cache_bytes=0).thumbnail("0.png", None, 160) == first[0]


def test_what_many_ask_for_is_made_once(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, made, going_on = Photos([("", photo_folder)]), [], threading.Event()
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

    (photo_folder / "bad.png").write_bytes((photo_folder / "b.png").read_bytes()[:90])
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


def test_a_damaged_image_is_decoded_once(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, calls = Photos([("", photo_folder)]), 0
    (photo_folder / "bad.png").write_bytes((photo_folder / "b.png").read_bytes()[:90])
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
    noise_image(5).save(photo_folder / "bad.png")
    assert photos.thumbnail("bad.png", None, 160).media_type == "image/jpeg"
