"""Small files that ask much of whoever decodes them, and ordinary ones to break."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from .icc import DISPLAY_P3, rgb_profile

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""First pixel and steps of an interlaced PNG's passes."""
PALETTE = bytes(range(256)) * 3


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    if "append_images" in options:
        options["append_images"] = [further.copy() for further in options["append_images"]]
    image.copy().save(stream, kind, **options)  # copies: Pillow leaves an encoder's settings with an image that it saved
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def blank_png(width: int, height: int, depth: int, colours: int, *chunks: bytes, interlaced: bool = False) -> bytes:
    """All zeros, in a few kilobytes. colours: as in its header (0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA)."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    rows = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in (ADAM7 if interlaced else [(0, 0, 1, 1)])]
    left = sum(high * (1 + (wide * channels * depth + 7) // 8) for wide, high in rows)
    packer, parts, zeros = zlib.compressobj(9), list[bytes](), bytes(1 << 20)
    while left > 0:
        parts.append(packer.compress(zeros[:left]))
        left -= len(zeros)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, int(interlaced)))
    pixels = png_chunk(b"IDAT", b"".join([*parts, packer.flush()]))
    palette = png_chunk(b"PLTE", PALETTE) if colours == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + header + palette + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def exif_bomb(entries: int, size: int) -> bytes:
    """A TIFF directory whose entries all hold the same `size` bytes."""
    listed = b"".join(struct.pack("<HHII", 1 + n, 7, size, 8) for n in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + listed + bytes(4 + max(0, size - len(listed)))


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(segments: bytes) -> bytes:
    data = encoded(Image.new("RGB", (64, 64)), "JPEG")
    return data[:2] + segments + data[2:]


def scan_bomb(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(Image.new("L", (width, height)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xc4") : -2]
    return data[:-2] + last * scans + b"\xff\xd9"


def tiled_tiff(side: int, tile: int) -> bytes:
    """Deflated, of one tile."""
    body = zlib.compress(bytes(1000))
    numbers = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8 + 2 + 12 * 10 + 4, 325: len(body)}
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers.items())
    return b"II*\0" + struct.pack("<IH", 8, len(numbers)) + listed + bytes(4) + body


def animated(kind: str, frames: int) -> bytes:
    images = [Image.new("P", (300, 300), n % 256) for n in range(frames)]
    for image in images:
        image.putpalette(PALETTE)
    shown = images if kind == "GIF" else [image.convert("RGB") for image in images]
    return encoded(shown[0], kind, save_all=True, append_images=shown[1:], **({} if kind == "GIF" else {"method": 0}))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "palette of 80 Mpx": lambda: blank_png(10_000, 8_000, 8, 3),
    "transparent palette": lambda: blank_png(8_000, 5_000, 8, 3, png_chunk(b"tRNS", b"\x80" * 256)),
    "16-bit grey": lambda: blank_png(7_000, 7_000, 16, 0),
    "16-bit RGBA": lambda: blank_png(8_000, 5_000, 16, 6),
    "16-bit RGBA that is taken": lambda: blank_png(4_500, 4_500, 16, 6),
    "RGB": lambda: blank_png(8_000, 5_000, 8, 2),
    "interlaced": lambda: blank_png(5_000, 5_000, 8, 6, interlaced=True),
    "PNG shorter than it says": lambda: blank_png(7_000, 7_000, 8, 0)[:400],
    "60 zTXt bombs": lambda: blank_png(64, 64, 8, 2, *[png_chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(900_000)))] * 60),
    "iCCP bomb": lambda: blank_png(64, 64, 8, 2, png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(300_000_000), 1))),
    "PNG's EXIF bomb": lambda: blank_png(64, 64, 8, 2, png_chunk(b"eXIf", exif_bomb(20_000, 900_000))),
    "a million chunks": lambda: blank_png(64, 64, 8, 2, png_chunk(b"tEXt", b"") * 1_000_000),
    "progressive JPEG": lambda: encoded(Image.new("RGB", (7_000, 7_000)), "JPEG", progressive=True),
    "progressive JPEG, 4:4:4": lambda: encoded(Image.new("RGB", (7_000, 7_000)), "JPEG", progressive=True, subsampling=0),
    "CMYK JPEG": lambda: encoded(Image.new("CMYK", (7_000, 7_000)), "JPEG"),
    "scans": lambda: scan_bomb(4_000, 3_000, 1_000),
    "scans of a large JPEG": lambda: scan_bomb(7_000, 7_000, 60),
    "a million segments": lambda: jpeg_with(b"\xff\xfe\0\2" * 1_000_000),
    "fill bytes": lambda: jpeg_with(b"\xff" * 10_000_000),
    "JPEG's EXIF bomb": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + exif_bomb(5_000, 60_000))),
    "EXIF in 400 segments": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 400),
    "GIF's comment": lambda: (g := encoded(Image.new("P", (9, 9)), "GIF"))[:-1] + b"!\xfe" + b"\1a" * 9_000_000 + b"\0" + g[13:],
    "GIF": lambda: encoded(Image.new("P", (7_000, 7_000)), "GIF"),
    "GIF of 1000 frames": lambda: animated("GIF", 1_000),
    "WebP of 1000 frames": lambda: animated("WEBP", 1_000),
    "WebP": lambda: encoded(Image.new("RGB", (7_000, 7_000)), "WEBP", method=0),
    "WebP that is taken": lambda: encoded(Image.new("RGBA", (4_000, 3_000), (1, 2, 3, 4)), "WEBP", lossless=True, method=0),
    "TIFF, LZW": lambda: encoded(Image.new("RGBA", (4_000, 4_000)), "TIFF", compression="tiff_lzw"),
    "TIFF, Deflate in one strip": lambda: encoded(
        Image.new("RGBA", (4_000, 4_000)), "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: 4_000}
    ),
    "TIFF of floats": lambda: encoded(Image.new("F", (4_000, 4_000)), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF of large floats": lambda: encoded(Image.new("F", (7_000, 7_000)), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF with a tile of 1.6 Gpx": lambda: tiled_tiff(10, 40_000),
    "TIFF's directory": lambda: exif_bomb(30_000, 2_000_000),
    "BMP of run lengths": lambda: encoded(Image.new("P", (7_000, 7_000)), "BMP")[:30] + b"\1" + bytes(2_000),
}


def ordinary_images() -> list[bytes]:
    """One of each format and of many modes, a few hundred bytes each, with metadata."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(np.arange(17 * 13, dtype=np.uint16).reshape(13, 17) * 250)
    rgba = noise.convert("RGBA")
    rgba.putalpha(noise.convert("L"))
    paletted = noise.quantize(16)
    return [
        encoded(noise, "JPEG", exif=exif, icc_profile=rgb_profile(DISPLAY_P3, gamma=2.2)), encoded(noise, "JPEG", progressive=True),
        encoded(noise.convert("CMYK"), "JPEG"), encoded(noise, "MPO", save_all=True, append_images=[noise]),
        encoded(noise, "PNG", exif=exif), encoded(grey16, "PNG"), encoded(rgba, "PNG"), encoded(paletted, "PNG", transparency=1),
        encoded(paletted, "GIF", save_all=True, append_images=[paletted, noise.quantize(8)], comment="c"),
        encoded(noise, "BMP"), encoded(paletted, "BMP"), encoded(noise, "WEBP", exif=exif), encoded(rgba, "WEBP", lossless=True),
        encoded(noise, "WEBP", save_all=True, append_images=[rgba.convert("RGB")]), encoded(noise, "AVIF", exif=exif),
        *(encoded(noise, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "raw", "jpeg")),
        encoded(noise.convert("1"), "TIFF", compression="group4"), encoded(grey16, "TIFF"), encoded(noise.convert("F"), "TIFF"),
        encoded(noise, "TIFF", exif=exif, save_all=True, append_images=[noise]), encoded(noise, "TIFF", big_tiff=True),
    ]  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bytes, a field of four bytes set to an extreme, a cut, a piece doubled or moved; one to three of these."""
    for _ in range(rng.integers(1, 4)):
        broken, at = bytearray(data), int(rng.integers(len(data))) if len(data) else 0
        match int(rng.integers(6)):
            case 0:
                for place in rng.integers(0, max(len(broken), 1), rng.integers(1, 9)).tolist():
                    broken[place : place + 1] = bytes([int(rng.integers(256))])
            case 1:
                extreme = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF, 0x10000, 0x80000000)[int(rng.integers(7))]
                broken[at : at + 4] = struct.pack((">L", "<L")[int(rng.integers(2))], extreme)
            case 2:
                broken[at : at + 2] = bytes([255, int(rng.integers(256))])
            case 3:
                del broken[at:]
            case 4:
                broken[at:at] = broken[at : at + int(rng.integers(1, 200))] * int(rng.integers(1, 50))
            case _:
                other = int(rng.integers(max(len(broken), 1)))
                broken[other:other] = broken[at : at + int(rng.integers(1, 64))]
        data = bytes(broken)
    return data
