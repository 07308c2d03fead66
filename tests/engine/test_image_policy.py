"""What strangers send: formats, files that are none, costs, metadata, colours. The hostile images are in support/hostile_images.py."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.hostile_images import HOSTILE, blank_png, encoded, exif_bomb, jpeg_with, ordinary_images, png_chunk, scan_bomb, segment
from support.icc import ADOBE_RGB, DISPLAY_P3, SRGB, grey_profile, rgb_profile
from support.samples import noise_image

from dqe_engine import preprocessing
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.image_metadata import exif_orientation, without_metadata
from dqe_engine.image_policy import ImagePolicy
from dqe_engine.image_sources import find_images, image_pairs
from dqe_engine.preprocessing import fit_image, open_image, preprocess

SPEC = PreprocessingSpec(image_size=32)
PICTURE = noise_image(5, (30, 20))
MOST_GROWTH = 256  # MiB, what the policy promises


def pixels(source: bytes | Image.Image | Path, policy: ImagePolicy | None = None) -> np.ndarray:
    return np.asarray(open_image(source, SPEC, policy or ImagePolicy()), np.int16)


def workers(*arguments: str) -> dict[str, object]:
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "support.image_workers", *arguments], cwd=tests, capture_output=True, text=True, check=True, timeout=280
    )
    return json.loads(done.stdout)


# -- formats ---------------------------------------------------------------------------------------------------------------


def test_no_decoder_outside_the_list_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow runs `gs` for an EPS; here the program would leave a file."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(eps)
    for source in (eps, tmp_path / "a.jpg"):
        with pytest.raises(InputError, match="not an image of an accepted format; save it as JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF"):
            open_image(source, SPEC)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000", "DDS", "ICNS", "PDF", "IM", "MSP"])
def test_other_formats_are_refused(kind: str) -> None:
    image = Image.new("1" if kind == "MSP" else "RGB", (64, 64))
    with pytest.raises(InputError, match="not an image of an accepted format"):
        open_image(encoded(image, kind), SPEC)


def test_listed_formats_are_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    for number, data in enumerate(ordinary_images()):
        (tmp_path / f"{number}.txt").write_bytes(data)
        assert open_image(tmp_path / f"{number}.txt", SPEC).mode == "RGB"


def test_a_policy_reads_what_it_lists() -> None:
    png = encoded(PICTURE, "PNG")
    assert np.array_equal(pixels(png, ImagePolicy(formats=("PNG",))), np.asarray(PICTURE))
    with pytest.raises(InputError, match=r"<\d+ bytes>: not an image of an accepted format; save it as JPEG, GIF$"):
        open_image(png, SPEC, ImagePolicy(formats=("JPEG", "GIF")))


def test_a_plugins_format_counts_once_it_is_registered_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    data = b"\0\0\0\x18ftypheic" + bytes(40)
    listed = ImagePolicy(formats=("JPEG", "HEIF"))
    assert listed.recognise(data[:16]) is None
    monkeypatch.setitem(Image.OPEN, "HEIF", (Image.OPEN["PNG"][0], lambda start: start[4:12] == b"ftypheic"))
    assert listed.recognise(data[:16]) == "HEIF"
    assert ImagePolicy().recognise(data[:16]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ("EPS",)}, r"formats must be a tuple of some of JPEG, .*, HEIF, got \('EPS',\)"),
        ({"formats": "JPEG"}, "got 'JPEG'"),
        ({"formats": ()}, "formats must be a tuple of some of"),
        ({"max_pixels": 0}, "max_pixels must be positive, got 0"),
        ({"max_seconds": float("nan")}, "max_seconds must be positive"),
    ],
)
def test_policies_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImagePolicy(**options)


def test_the_first_picture_of_several() -> None:
    second = Image.new("RGB", PICTURE.size)
    for kind, options in (("MPO", {"quality": 95}), ("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True})):
        alone = encoded(PICTURE, "JPEG" if kind == "MPO" else kind, **options)
        several = encoded(PICTURE, kind, save_all=True, append_images=[second], **options)
        assert len(several) > len(alone)
        assert np.array_equal(pixels(several), pixels(alone)), kind


# -- files that are none ---------------------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to would hang for ever; a device never ends."""
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for place in (tmp_path / "fifo.jpg", tmp_path / "link.jpg", Path("/dev/null")):
            with pytest.raises(InputError, match=f"{place}: not a regular file; expected an image file"):
                open_image(place, SPEC)
        with pytest.raises(InputError, match=str(tmp_path / "s")):
            open_image(tmp_path / "s", SPEC)


def test_a_str_is_no_image(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png' is a str, not an image; pass Path\(...\) for a file; an item .* reference_id="):
        open_image(str(tmp_path / "a.png"), SPEC)  # type: ignore[arg-type]


# -- costs -----------------------------------------------------------------------------------------------------------------


def test_no_hostile_image_costs_more_than_is_promised(tmp_path: Path) -> None:
    for name, make in HOSTILE.items():
        (tmp_path / name).write_bytes(make())
    found = workers("costs", str(tmp_path))
    assert found.keys() == HOSTILE.keys()
    for name, (grown, said) in found.items():
        assert said == "taken" or (said.startswith("refused: ") and "\n" not in said), (name, said)
        assert grown < MOST_GROWTH, (name, grown)
    taken = {name for name, (_, said) in found.items() if said == "taken"}
    assert {"16-bit grey", "RGB", "interlaced", "progressive JPEG", "CMYK JPEG", "GIF", "WebP that is taken", "TIFF, LZW"} <= taken


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scan_bomb(99, 99, 100), "a JPEG of more than 100 scans; save it as a baseline JPEG"),
        (lambda: scan_bomb(5_000, 5_000, 80), "JPEG of 5000 x 5000 pixels: takes about .* s to decode, more than the limit of 1; scale it"),
        (lambda: blank_png(7_000, 7_000, 16, 6), "PNG of 7000 x 7000 pixels: takes about"),
        (lambda: encoded(Image.new("RGB", (4_000, 4_000)), "WEBP", method=0), "WEBP of 4000 x 4000 pixels: needs about 305 MiB to decode"),
        (
            lambda: jpeg_with(segment(0xDB, bytes(3)) * 501),
            "a JPEG with more than 500 tables",
        ),
        (lambda: blank_png(9, 9, 8, 2, png_chunk(b"tEXt", b"") * 200_001), "made of more than 200000 chunks"),
        (lambda: encoded(PICTURE, "TIFF", compression="zstd"), "a TIFF of compression 50000 is not read; save it with LZW or Deflate"),
    ],
)
def test_refused_for_its_cost(make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_image(make(), SPEC)
    assert "\n" not in str(caught.value)


def test_a_policy_may_allow_more() -> None:
    data = scan_bomb(2_000, 2_000, 90)
    assert pixels(data, ImagePolicy(max_seconds=60)).shape == (2_000, 2_000, 3)
    with pytest.raises(InputError, match=r"limit of 0\.1; scale it down"):
        open_image(data, SPEC, ImagePolicy(max_seconds=0.1))


def test_the_decoder_gets_no_metadata() -> None:
    """What Pillow would read in Python, at any length."""
    plain = encoded(PICTURE, "JPEG")
    texts = segment(0xE1, b"Exif\0\0" + bytes(60_000)) + segment(0xED, bytes(60_000)) * 50 + segment(0xFE, b"c")
    assert len(without_metadata(plain[:2] + b"\xff" * 1000 + texts + plain[2:], "JPEG").data) == len(plain)
    png = blank_png(9, 9, 8, 2, png_chunk(b"zTXt", bytes(10_000)), png_chunk(b"iCCP", bytes(10_000)), png_chunk(b"fdAT", bytes(10_000)))
    assert without_metadata(png, "PNG").data == blank_png(9, 9, 8, 2)
    frames = [Image.new("P", (9, 9), n) for n in range(20)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"c" * 5_000)
    assert len(without_metadata(gif, "GIF").data) < len(encoded(frames[0], "GIF")) + 50


def test_orientation_from_hostile_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert exif_orientation(exif.tobytes()) == 6
    assert exif_orientation(exif.tobytes().removeprefix(b"Exif\0\0")) == 6
    for start in (b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", exif_bomb(60_000, 100)):
        assert exif_orientation(start) == 1
    exif[0x0112] = 9
    assert exif_orientation(exif.tobytes()) == 1


def test_300_mutated_images() -> None:
    """A seeded piece of a longer run: nothing but InputError, one line each, in a process of bounded memory."""
    found = workers("fuzz", "0", "300")
    assert found["failures"] == []
    assert 30 < found["taken"] < 270
    assert found["peak"] < 300


# -- shrinking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_strips_change_no_bit(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = noise_image(3, (33, 57))
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(np.asarray(noise.convert("L")).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 200)
    else:
        image = noise.convert(mode)
    whole = pixels(image)
    monkeypatch.setattr(preprocessing, "_STRIP_PIXELS", 100)
    assert np.array_equal(pixels(image), whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_what_is_shrunk_first_is_much_the_same(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (kind, mode) in (("JPEG", "P"), ("JPEG", "RGBA"), ("PNG", "CMYK")):
        return
    monkeypatch.setattr(preprocessing, "EXACT_PIXELS", 100_000)
    smooth = noise_image(2, (12, 9)).resize((801, 600), Image.Resampling.BICUBIC)
    image = smooth.quantize(64) if mode == "P" else smooth.convert(mode)
    if mode == "RGBA":
        image.putalpha(noise_image(4, (6, 5)).resize(image.size).convert("L"))
    data = encoded(image, kind)
    shrunk = open_image(data, SPEC)
    assert shrunk.size == ((201, 150) if kind == "JPEG" else (267, 200))  # a JPEG by powers of two
    monkeypatch.setattr(preprocessing, "EXACT_PIXELS", 1 << 24)
    exact = open_image(data, SPEC)
    assert exact.size == (801, 600)
    difference = np.abs(fit_image(shrunk, SPEC).astype(int) - fit_image(exact, SPEC))
    assert difference.mean() < 1
    assert difference.max() <= 10  # at the edge, whose last block of pixels is not full


# -- colours ---------------------------------------------------------------------------------------------------------------


def stored_in(profile: bytes, image: Image.Image) -> bytes:
    """The picture in the numbers of another colour space, with its profile."""
    other = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    numbers = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), other, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC)
    return encoded(numbers, "PNG", icc_profile=profile)


SMOOTH = noise_image(8, (9, 7)).resize((64, 48), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("profile", [rgb_profile(DISPLAY_P3), rgb_profile(ADOBE_RGB, gamma=2.2)], ids=["Display P3", "Adobe RGB"])
def test_colours_of_a_profile_become_srgb(profile: bytes) -> None:
    data = stored_in(profile, SMOOTH)
    wanted = np.asarray(SMOOTH, int)
    assert np.abs(pixels(data) - wanted).mean() < 1
    assert np.abs(pixels(data, ImagePolicy(to_srgb=False)) - wanted).mean() > 4
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(pixels(opened), pixels(data))
        jpeg = encoded(opened.convert("RGB"), "JPEG", quality=95, icc_profile=profile, subsampling=0)
    assert np.abs(pixels(jpeg) - wanted).mean() < 2


def test_srgb_profiles_change_no_bit() -> None:
    """By what a profile does, not by what it is called: makers' own, and lcms's of other precision."""
    nearly = tuple((x + 0.0001, y - 0.0001) for x, y in SRGB)
    for profile in (rgb_profile(SRGB), rgb_profile(nearly), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        for kind in ("PNG", "TIFF"):
            data = encoded(SMOOTH, kind, icc_profile=profile)
            assert preprocess([data], SPEC).tobytes() == preprocess([SMOOTH], SPEC).tobytes()


def test_grey_and_alpha_have_profiles_too() -> None:
    grey = SMOOTH.convert("L")
    lighter = pixels(encoded(grey, "PNG", icc_profile=grey_profile(1.2)))
    assert lighter.mean() > np.asarray(grey).mean() + 20
    rgba = SMOOTH.convert("RGBA")
    profile = rgb_profile(DISPLAY_P3)
    assert np.abs(pixels(encoded(rgba, "PNG", icc_profile=profile)) - pixels(encoded(SMOOTH, "PNG", icc_profile=profile))).max() == 0


@pytest.mark.parametrize(
    "profile",
    [b"x" * 300, rgb_profile(DISPLAY_P3)[:200], b"", grey_profile(1.2), rgb_profile(DISPLAY_P3)[:128] + bytes(600), bytes(5 << 20)],
    ids=["junk", "cut", "empty", "of greys", "no tags", "too large"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_broken_profile_never_fails_an_image(kind: str, profile: bytes) -> None:
    plain, with_profile = encoded(SMOOTH, kind), encoded(SMOOTH, kind, icc_profile=profile)
    assert np.array_equal(pixels(with_profile), pixels(plain))


# -- folders ---------------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_by_content_and_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("a.jfif", "b.jpe", "sub/c.JPG", "no-suffix", "odd.name"):
        (folder / name).write_bytes(encoded(PICTURE, "JPEG"))
    (folder / "d.avif").write_bytes(encoded(PICTURE, "AVIF"))
    (folder / "page.jpg").write_bytes(b"<html>")  # which says that it is an image: an error where it is read
    for name in ("._a.jfif", "sub/._c.JPG"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0" + bytes(50))
    (folder / "._real.png").write_bytes(encoded(PICTURE, "PNG"))
    (folder / "notes.txt").write_text("hello")
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    (folder / "gone").symlink_to(tmp_path / "absent")
    PICTURE.save(elsewhere / "e.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked.png").symlink_to(elsewhere / "e.png")
    found = find_images(folder)
    assert [id for id, _ in found.pairs] == [
        "._real.png", "a.jfif", "b.jpe", "d.avif", "linked.png", "no-suffix", "odd.name", "page.jpg", "sub/c.JPG",
    ]  # fmt: skip
    assert found.describe_passed_over() == (
        "7 skipped: 2 companions of macOS (._*), 1 linked folders (not followed), 1 not a regular file, 2 not an image, 1 not readable"
    )
    assert image_pairs(folder) == image_pairs(str(folder)) == found.pairs
    assert [id for id, _ in find_images(folder, ImagePolicy(formats=("AVIF",))).pairs if "." not in id] == []
    assert find_images(elsewhere).describe_passed_over() == ""
