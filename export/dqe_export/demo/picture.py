"""One picture of real output for the README: reference, text, weights and the first hits of a few queries."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dqe_engine.errors import InputError
from dqe_engine.files import atomic_write

from .report_data import ExampleQuery, ReportData
from .thumbnails import open_thumbnail

WIDTH, MARGIN, ROW, IMAGE, GAP, HITS = 1200, 36, 138, 106, 14, 6
LIMIT = 300_000
INK, MUTED, RULE, ACCENT, QUIET = "#18222d", "#5a6672", "#dde3e8", "#0b5fa5", "#b3bdc7"
_TEXT_LEFT = MARGIN + IMAGE + 24
_HITS_LEFT = WIDTH - MARGIN - HITS * IMAGE - (HITS - 1) * GAP
_SCALE = 4  # rounded corners are drawn this much larger, then reduced


def write_picture(data: ReportData, out: Path, rows: int = 5) -> None:
    """Draw the first `rows` examples to a JPEG below 300 kB, 1200 pixels wide. Raises InputError for other suffixes."""
    out = Path(out)
    if out.suffix.lower() not in {".jpg", ".jpeg"}:
        raise InputError(f"{out}: the picture is written as JPEG; name it .jpg")
    queries = data.examples[:rows]
    if rows < 1 or not queries:
        raise InputError(f"no queries to draw: {len(data.examples)} examples, {rows} rows asked for")
    top = 58
    canvas = Image.new("RGB", (WIDTH, top + len(queries) * ROW + 14), "white")
    draw = ImageDraw.Draw(canvas)
    small = _font(15)
    for x, text in (
        (MARGIN, "reference"),
        (_TEXT_LEFT, "modification text, attribute weights"),
        (_HITS_LEFT, f"first {HITS} hits, valid ones framed"),
    ):
        draw.text((x, 24), text, fill=MUTED, font=small)
    largest = max((w for q in queries for w in q.weights.values()), default=1.0) or 1.0
    for i, query in enumerate(queries):
        _draw_row(canvas, draw, data.image_root, query, top + i * ROW, largest)
    with atomic_write(out) as stream:
        stream.write(_encode(canvas))


def _draw_row(canvas: Image.Image, draw: ImageDraw.ImageDraw, root: str, query: ExampleQuery, y: int, largest: float) -> None:
    draw.line((MARGIN, y - 8, WIDTH - MARGIN, y - 8), fill=RULE)
    y += (ROW - 16 - IMAGE) // 2 + 4
    _paste(canvas, open_thumbnail(root, query.reference), MARGIN, y)
    width = _HITS_LEFT - _TEXT_LEFT - 30
    lines = _wrap(draw, f"“{query.text}”", _font(18, "DejaVuSerif-Italic"), width, 2)
    bars = list(query.weights.items())[:4]
    height = 24 * len(lines) + (6 + 14 * len(bars) if bars else 0)
    at = y + max(0, (IMAGE - height) // 2) - 2
    for line in lines:
        draw.text((_TEXT_LEFT, at), line, fill=INK, font=_font(18, "DejaVuSerif-Italic"))
        at += 24
    at += 6
    font = _font(12)
    label = 14 + max((round(draw.textlength(name, font=font)) for name, _ in bars), default=0)
    for name, weight in bars:
        named = query.named is None or name in query.named
        draw.text((_TEXT_LEFT, at), name, fill=INK if named else MUTED, font=font)
        left, full = _TEXT_LEFT + label, width - label - 40
        draw.rectangle((left, at + 4, left + full, at + 10), fill="#eceff2")
        draw.rectangle((left, at + 4, left + max(1, round(full * max(weight, 0.0) / largest)), at + 10), fill=ACCENT if named else QUIET)
        draw.text((left + full + 8, at), f"{weight:.2f}", fill=MUTED, font=font)
        at += 14
    for k, hit in enumerate(query.hits[:HITS]):
        x = _HITS_LEFT + k * (IMAGE + GAP)
        _paste(canvas, open_thumbnail(root, hit.image), x, y)
        if hit.valid:
            _frame(canvas, x, y)


def _paste(canvas: Image.Image, image: Image.Image, x: int, y: int) -> None:
    """Centre-cropped to a square with rounded corners."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((IMAGE, IMAGE), Image.Resampling.LANCZOS)
    mask = Image.new("L", (IMAGE * _SCALE, IMAGE * _SCALE), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, *(s - 1 for s in mask.size)), radius=5 * _SCALE, fill=255)
    canvas.paste(square, (x, y), mask.resize((IMAGE, IMAGE), Image.Resampling.LANCZOS))


def _frame(canvas: Image.Image, x: int, y: int) -> None:
    """A ring with a gap to the image and a tick at its corner: read by shape, not by colour alone."""
    pad = 12
    size = IMAGE + 2 * pad
    layer = Image.new("RGBA", (size * _SCALE, size * _SCALE), (11, 95, 165, 0))
    draw = ImageDraw.Draw(layer)

    def scaled(*values: float) -> tuple[int, ...]:
        return tuple(round(v * _SCALE) for v in values)

    draw.rounded_rectangle(
        scaled(pad - 5, pad - 5, pad + IMAGE + 4.75, pad + IMAGE + 4.75), radius=9 * _SCALE, outline=ACCENT, width=3 * _SCALE
    )
    cx, cy = pad + IMAGE + 2, pad - 2
    draw.ellipse(scaled(cx - 9.5, cy - 9.5, cx + 9.5, cy + 9.5), fill=ACCENT)
    draw.line(scaled(cx - 4, cy + 0.5, cx - 1, cy + 3.5, cx + 4.5, cy - 3.5), fill="white", width=2 * _SCALE, joint="curve")
    layer = layer.resize((size, size), Image.Resampling.LANCZOS)
    canvas.paste(layer, (x - pad, y - pad), layer)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """At most `most` lines no wider than `width`; what does not fit ends in an ellipsis."""
    words, lines = text.split(), [""]
    for k, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {' '.join(words[k:])}"
            break
    return [_shorten(draw, line, font, width) for line in lines]


def _shorten(draw: ImageDraw.ImageDraw, line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(line, font=font) <= width:
        return line
    kept = line[:200]
    while kept and draw.textlength(f"{kept.rstrip()}…”", font=font) > width:
        kept = kept[:-1]
    return f"{kept.rstrip()}…”"


def _font(size: int, face: str = "DejaVuSans") -> ImageFont.FreeTypeFont:
    """The fonts that come with matplotlib: the same picture on every machine, and letters beyond ASCII."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"), size)


def _encode(canvas: Image.Image) -> bytes:
    """JPEG at the best quality that stays below the limit; the lowest one whatever it weighs."""
    raw = b""
    for quality in (93, 90, 86, 82, 76, 68, 58):
        stream = io.BytesIO()
        canvas.save(stream, "JPEG", quality=quality, subsampling=0 if quality > 70 else 2, optimize=True)
        raw = stream.getvalue()
        if len(raw) < LIMIT:
            break
    return raw
