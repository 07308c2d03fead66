"""Preprocessing: equal to the bit to transformers' BlipImageProcessor, and every odd image ends in pixels or one clear line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, UnidentifiedImageError
from support.samples import noise_image

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.image_policy import ImagePolicy
from dqe_engine.preprocessing import fit_image, open_image, preprocess

SPEC = PreprocessingSpec(image_size=32)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and ends before its first row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT", b"")


@pytest.mark.training
@pytest.mark.parametrize("size", [(1, 1), (2, 97), (31, 33), (32, 32), (33, 31), (257, 19), (640, 480)])
def test_equal_to_the_bit_to_transformers(size: tuple[int, int]) -> None:
    import transformers

    kind = getattr(transformers, "BlipImageProcessorPil", None) or transformers.BlipImageProcessor
    processor = kind(size={"height": 32, "width": 32})
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    expected = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
    got = preprocess([image], SPEC)
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape == (1, 3, 32, 32)
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"hello, this is text", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (encoded(noise_image(0), "JPEG")[:400], "damaged or truncated"),
        (encoded(noise_image(0), "PNG")[:60], "damaged or truncated"),
        (png_header(30_000, 30_000), "30000 x 30000 pixels, more than the limit"),
        (png_header(12_000, 12_000), "12000 x 12000 pixels, more than the limit"),
        (png_header(7_072, 7_072), "7072 x 7072 pixels, more than the limit of 50000000"),
    ],
    ids=["empty", "text", "signature", "jpeg cut", "png cut", "bomb", "bomb below Pillow's error", "bomb below Pillow's warning"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        open_image(data, SPEC)
    assert "\n" not in str(caught.value)
    if "30000" in message:  # beyond twice Pillow's own limit, Pillow answers first
        message = "more pixels than the limit"
    assert message in str(caught.value)


def test_limit_is_the_policys_own() -> None:
    """A bundle's `max_pixels` decides nothing any more."""
    image = noise_image(0, (20, 20))
    for source in (image, encoded(image)):
        assert open_image(source, PreprocessingSpec(image_size=32, max_pixels=1), ImagePolicy(max_pixels=400)).size == (20, 20)
        with pytest.raises(InputError, match="20 x 20 pixels"):
            open_image(source, SPEC, ImagePolicy(max_pixels=399))


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such image file"):
        open_image(tmp_path / "absent.png", SPEC)
    with pytest.raises(InputError, match="is a directory"):
        open_image(tmp_path, SPEC)
    with pytest.raises(InputError):
        open_image(Path("a\0b.png"), SPEC)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_corrupted_bytes_never_escape_as_another_error(position: int, value: int, cut: int) -> None:
    for data in (TIFF, GIF, WEBP):
        broken = bytearray(data)
        broken[position % len(broken)] = value
        try:
            assert open_image(bytes(broken[: cut % len(broken) + 1]), SPEC).mode == "RGB"
        except InputError:
            continue


TIFF = encoded(noise_image(1), "TIFF", compression="tiff_lzw")
GIF = encoded(noise_image(1), "GIF")
WEBP = encoded(noise_image(1), "WEBP")


def test_one_pixel() -> None:
    pixels = fit_image(open_image(encoded(Image.new("RGB", (1, 1), (10, 20, 30))), SPEC), SPEC)
    assert (pixels == (10, 20, 30)).all()
    assert pixels.shape == (32, 32, 3)


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), SPEC)
    red, green, blue = image.getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert [pixel[0] for pixel in np.asarray(open_image(encoded(Image.fromarray(ramp)), SPEC))[0]] == [0, 1, 128, 255]
    dark = np.array([[0, 100, 200]], np.uint16)  # opened as "I" by Pillow before 10.3, and taken for 8 bits then
    assert [pixel[0] for pixel in np.asarray(open_image(encoded(Image.fromarray(dark)), SPEC))[0]] == [0, 0, 1]


def test_palette_transparency_is_composited_onto_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(open_image(encoded(image, "PNG", transparency=0), SPEC))
    assert pixels.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_alpha_is_composited_onto_the_background() -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert open_image(half, SPEC).getpixel((0, 0)) == (127, 127, 127)
    assert open_image(half, PreprocessingSpec(image_size=32, background=(0, 0, 0))).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "I;16", "F", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert open_image(Image.new(mode, (3, 2)), SPEC).mode == "RGB"


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (29, 9)), (6, (9, 0)), (8, (0, 29))])
def test_exif_orientation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_image(encoded(image, "PNG", exif=exif), SPEC)
    assert upright.size == ((30, 10) if orientation in (1, 3) else (10, 30))
    assert upright.getpixel(corner) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_in_every_format(kind: str, orientation: int) -> None:
    """Pillow turns TIFFs itself, and up to 10.0 left the word of it in place."""
    image = Image.new("RGB", (64, 32), "black")
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    transverse = image.transpose(Image.Transpose.TRANSVERSE)
    turned = {
        1: image, 2: ImageOps.mirror(image), 3: image.rotate(180), 4: ImageOps.flip(image), 5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.rotate(-90, expand=True), 7: transverse, 8: image.rotate(90, expand=True),
    }[orientation]  # fmt: skip
    upright = open_image(encoded(image, kind, exif=exif), SPEC)
    assert upright.size == turned.size
    assert np.abs(np.asarray(upright, int) - np.asarray(turned, int)).max() < 60  # JPEG and WebP round


# -- metadata that is no reason to refuse pixels ---------------------------------------------------------------------------

PICTURE = noise_image(5, (30, 20))
MALFORMED_EXIF = b"Exif\0\0not a TIFF at all"
LARGE_TEXT = b"comment\0\0" + zlib.compress(b"a" * 2_000_000)


def png_chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def png_with(chunk: bytes, *, at_end: bool) -> bytes:
    """`PICTURE` with a chunk before or after its pixels."""
    data = encoded(PICTURE)
    at = data.index(b"IEND") - 4 if at_end else data.index(b"IDAT") - 4
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", LARGE_TEXT), png_chunk(b"iTXt", b"XML\0\1\0\0\0" + LARGE_TEXT[9:]),
        png_chunk(b"tEXt", b"a\0" + b"b" * 30_000_000),
        png_chunk(b"iCCP", b"profile\0\7junk"), png_chunk(b"iCCP", b"profile\0\0" + LARGE_TEXT[9:]), png_chunk(b"pHYs", b"\0"),
        png_chunk(b"tEXt", b"a\0b", crc=1), png_chunk(b"eXIf", MALFORMED_EXIF[6:]), png_chunk(b"eXIf", b"", crc=7),
    ],
    ids=["large zTXt", "large iTXt", "large tEXt", "odd profile", "large profile", "short pHYs", "text's CRC", "EXIF", "EXIF's CRC"],
)  # fmt: skip
def test_a_png_is_its_pixels(chunk: bytes, at_end: bool) -> None:
    assert np.array_equal(np.asarray(open_image(png_with(chunk, at_end=at_end), SPEC)), np.asarray(PICTURE))


def test_a_png_that_loses_its_texts_keeps_its_orientation_and_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "PNG", transparency=0, exif=exif)
    at = data.index(b"IDAT") - 4
    upright = open_image(data[:at] + png_chunk(b"zTXt", LARGE_TEXT) + data[at:], SPEC)
    assert np.asarray(upright).tolist() == [[[255, 255, 255]], [[0, 0, 255]]]


def test_metadata_hides_no_damage(tmp_path: Path) -> None:
    whole = png_with(png_chunk(b"zTXt", LARGE_TEXT), at_end=False)
    for broken in (whole[:-100], whole.replace(b"IDAT", b"JDAT"), png_header(30_000, 30_000) + whole[8:]):
        (tmp_path / "broken.png").write_bytes(broken)
        for source in (broken, tmp_path / "broken.png"):
            with pytest.raises(InputError):
                open_image(source, SPEC)
    (tmp_path / "whole.png").write_bytes(whole)
    assert open_image(tmp_path / "whole.png", SPEC).size == PICTURE.size
    with pytest.raises(InputError, match="30 x 20 pixels, more than the limit"):
        open_image(whole, SPEC, ImagePolicy(max_pixels=599))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_malformed_exif(kind: str) -> None:
    plain = open_image(encoded(PICTURE, kind), SPEC)
    assert np.array_equal(np.asarray(open_image(encoded(PICTURE, kind, exif=MALFORMED_EXIF), SPEC)), np.asarray(plain))


def test_a_jpeg_is_its_scan() -> None:
    """A profile that Pillow cannot read, an orientation that counts, and the Adobe segment that says what CMYK is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (PICTURE, PICTURE.convert("CMYK")):
        data = encoded(image, "JPEG", exif=exif)
        profile = b"ICC_PROFILE\0"  # without the two counters that follow
        odd = data[:2] + b"\xff\xff\xe2" + struct.pack(">H", 2 + len(profile)) + profile + data[2:]
        with pytest.raises(UnidentifiedImageError), Image.open(io.BytesIO(odd)) as opened:
            opened.load()
        assert np.array_equal(np.asarray(open_image(odd, SPEC)), np.asarray(open_image(data, SPEC)))
        assert open_image(odd, SPEC).size == PICTURE.size[::-1]


# -- greys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 100, 255], [0, 100, 255]), ("I", [0, 256, 65535], [0, 1, 255]), ("I", [-9, 257, 100_000], [0, 1, 255]),
        ("I;16", [0, 100, 255], [0, 0, 1]), ("I;16", [0, 257, 65535], [0, 1, 255]), ("I;16B", [0, 32896, 65535], [0, 128, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]), ("F", [0.0, 100.0, 255.0], [0, 100, 255]), ("F", [float("nan"), 0.5, 1.0], [0, 128, 255]),
        ("F", [0.0, 25_700.0, 65535.0], [0, 100, 255]),
    ],
)  # fmt: skip
def test_greys_by_their_mode(mode: str, values: list[float], expected: list[int]) -> None:
    image = Image.new(mode, (3, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    assert [pixel[0] for pixel in np.asarray(open_image(image, SPEC))[0].tolist()] == expected
    if mode != "I;16B":  # Pillow writes it as I;16
        assert [pixel[0] for pixel in np.asarray(open_image(encoded(image, "TIFF"), SPEC))[0].tolist()] == expected


def test_target_pad_keeps_the_aspect_ratio_within_bounds() -> None:
    spec = PreprocessingSpec(image_size=32, fit="target_pad", target_ratio=1.0, background=(255, 255, 255))
    pixels = fit_image(Image.new("RGB", (64, 16), "black"), spec)
    assert (pixels[0] == 255).all()
    assert (pixels[16] == 0).all()


def padded_resized_cropped(image: Image.Image, size: int, ratio: float, colour: tuple[int, int, int]) -> np.ndarray:
    """CLIP4Cir's TargetPad, then the shorter side resized and the centre cropped, step by step on an array of pixels."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    if max(width, height) / min(width, height) >= ratio:
        wanted = max(width, height) / ratio
        across, down = max(int((wanted - width) / 2), 0), max(int((wanted - height) / 2), 0)
        canvas = np.empty((height + 2 * down, width + 2 * across, 3), np.uint8)
        canvas[:] = colour
        canvas[down : down + height, across : across + width] = pixels
        pixels = canvas
    height, width, _ = pixels.shape
    shorter = min(width, height)
    resized = Image.fromarray(pixels).resize((int(size * width / shorter), int(size * height / shorter)), Image.Resampling.BICUBIC)
    top, left = round((resized.height - size) / 2), round((resized.width - size) / 2)
    return np.asarray(resized)[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 90), (64, 16), (16, 64), (40, 32), (32, 40), (41, 32), (33, 32), (32, 32), (500, 333), (97, 61), (223, 224)]
)
@pytest.mark.parametrize("ratio", [1.0, 1.25, 1.7])
def test_target_pad_crop_equals_its_reference(size: tuple[int, int], ratio: float) -> None:
    image = noise_image(sum(size), size)
    assert image.size == size
    spec = PreprocessingSpec(image_size=32, fit="target_pad_crop", target_ratio=ratio, background=(10, 0, 250))
    assert np.array_equal(fit_image(image, spec), padded_resized_cropped(image, 32, ratio, (10, 0, 250)))


def test_target_pad_crop_pads_and_crops() -> None:
    spec = PreprocessingSpec(image_size=40, fit="target_pad_crop", background=(0, 0, 0))
    tall = fit_image(Image.new("RGB", (100, 250), "white"), spec)  # padded to 200 x 250, then 40 x 50, of which 40 rows stay
    assert (tall[:, :9] == 0).all()
    assert (tall[:, -9:] == 0).all()
    assert (tall[:, 12:-12] == 255).all()
    within = fit_image(Image.new("RGB", (100, 120), "white"), spec)
    assert (within == 255).all(), "nothing is padded below the target ratio"


@pytest.mark.parametrize("fit", ["target_pad", "target_pad_crop"])
def test_a_sliver_is_shrunk_before_it_is_padded(fit: str) -> None:
    """Padded in full size, 1 x 1,000,000 pixels would take 2.4 TB."""
    sliver = Image.new("RGB", (1, 1_000_000), "black")
    spec = PreprocessingSpec(image_size=32, fit=fit, background=(255, 255, 255))
    pixels = fit_image(sliver, spec)
    assert pixels.shape == (32, 32, 3)
    assert pixels[:, 0].min() > 250
    wide = noise_image(1, (8, 2)).resize((16_000, 4_000), Image.Resampling.NEAREST)  # padded to 205 Mpx
    small = noise_image(1, (8, 2)).resize((1600, 400), Image.Resampling.NEAREST)
    assert np.abs(fit_image(wide, spec).astype(int) - fit_image(small, spec)).max() <= 3


def test_the_fits_differ_and_stretch_stays_the_default() -> None:
    image = noise_image(3, (90, 40))
    results = {
        fit: fit_image(image, PreprocessingSpec(image_size=32, fit=fit)).tobytes() for fit in ("stretch", "target_pad", "target_pad_crop")
    }
    assert len(set(results.values())) == 3
    assert fit_image(image, SPEC).tobytes() == results["stretch"]


def test_empty_batch() -> None:
    assert preprocess([], SPEC).shape == (0, 3, 32, 32)


def test_a_large_file_that_is_no_image_is_not_read_whole(tmp_path: Path) -> None:
    """It is refused by its first bytes, and a large image by its size."""
    with open(tmp_path / "disk.jpg", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(InputError, match=r"disk\.jpg: not an image"):
        open_image(tmp_path / "disk.jpg", SPEC)
    with open(tmp_path / "disk.jpg", "r+b") as stream:
        stream.write(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match=r"disk\.jpg: 1099511627776 bytes, more than the limit of 33554432"):
        open_image(tmp_path / "disk.jpg", SPEC)
    with pytest.raises(InputError, match="<40 bytes>: 40 bytes, more than the limit of 39"):
        open_image(b"\xff\xd8\xff\xe0" + bytes(36), SPEC, ImagePolicy(max_bytes=39))


def test_infinities_in_a_float_image_do_not_turn_it_black() -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.inf, -np.inf, np.nan
    grey = np.asarray(open_image(Image.fromarray(values), PreprocessingSpec(image_size=4)))[..., 0]
    assert grey[1:].min() == grey[1:].max() == 128
    assert grey[0].tolist() == [255, 0, 0, 128]
