"""Draws one garment photo with Pillow and NumPy: deterministic by generator, no two images alike pixel for pixel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .catalog import COLOURS, Garment

Points = list[tuple[float, float]]
# Parts of a silhouette, in garment coordinates: x right, y down, the neck or waistband at y = 0 and the hem at
# y = `h`; half a body width is about 0.25. "fill" parts make the mask, "seam" parts are lines drawn on the cloth.
Parts = dict[str, list[Points]]

_HEM = {"cropped": 0.48, "regular": 0.74, "long": 1.0}


def _mirror(points: Points) -> Points:
    return points + [(-x, y) for x, y in reversed(points)]


def _pair(points: Points) -> list[Points]:
    return [points, [(-x, y) for x, y in points]]


def _sleeves(shoulder: float, reach: float, drop: float, width: float) -> list[Points]:
    return _pair([(shoulder, 0.02), (shoulder + reach, drop), (shoulder + reach - width, drop + 0.05), (shoulder - 0.03, 0.22)])


def _tshirt(h: float, w: float) -> Parts:
    body = _mirror([(0.08, 0.03), (w, 0.0), (w - 0.01, h)])
    return {"fill": [body, *_sleeves(w, 0.15, 0.2, 0.09)], "seam": [[(-0.09, 0.03), (0.0, 0.08), (0.09, 0.03)]]}


def _tank_top(h: float, w: float) -> Parts:
    body = _mirror([(0.09, 0.2), (0.11, 0.0), (0.17, 0.0), (w - 0.04, 0.24), (w - 0.02, h)])
    return {"fill": [body], "seam": []}


def _hoodie(h: float, w: float) -> Parts:
    body = _mirror([(0.06, 0.0), (w, 0.02), (w, h)])
    hood = _mirror([(0.08, -0.16), (0.15, -0.07), (0.13, 0.05)])
    pocket = [(-0.13, h * 0.9), (-0.08, h * 0.64), (0.08, h * 0.64), (0.13, h * 0.9)]
    return {"fill": [body, hood, *_sleeves(w, 0.16, 0.55, 0.12)], "seam": [pocket, [(-0.08, 0.03), (0, 0.13), (0.08, 0.03)]]}


def _coat(h: float, w: float) -> Parts:
    body = _mirror([(0.05, 0.0), (w, 0.02), (w - 0.02, 0.3), (w + 0.07, h)])
    lapels = _pair([(0.05, 0.0), (0.11, 0.16), (0.0, 0.3)])
    return {"fill": [body, *_sleeves(w, 0.11, 0.56, 0.11)], "seam": [[(0.0, 0.28), (0.0, h)], *lapels]}


def _kimono(h: float, w: float) -> Parts:
    body = _mirror([(0.05, 0.0), (w, 0.0), (w, h)])
    sleeves = _pair([(w - 0.02, 0.0), (w + 0.24, 0.02), (w + 0.24, 0.34), (w - 0.02, 0.24)])
    belt = _mirror([(w, h * 0.55), (w, h * 0.55 + 0.09)])
    return {"fill": [body, *sleeves], "seam": [[(0.06, 0.0), (-0.08, h * 0.55)], [(-0.06, 0.0), (0.02, 0.16)]], "belt": [belt]}


def _poncho(h: float, w: float) -> Parts:
    body = _mirror([(0.07, 0.0), (w * 0.6, 0.06), (w + 0.24, h * 0.72), (0.0, h)])
    return {"fill": [body], "seam": [[(-0.08, 0.02), (0.0, 0.1), (0.08, 0.02)]]}


def _dress(h: float, w: float) -> Parts:
    waist = 0.3
    body = _mirror([(0.08, 0.12), (0.1, 0.0), (0.14, 0.0), (0.19, 0.14), (0.13, waist), (w + 0.1, h + 0.06)])
    return {"fill": [body], "seam": [[(-0.13, waist), (0.13, waist)]]}


def _skirt(h: float, w: float) -> Parts:
    body = _mirror([(0.15, 0.1), (w + 0.11, h + 0.02)])
    band = _mirror([(0.15, 0.04), (0.15, 0.1)])
    return {"fill": [body, band], "seam": [[(-0.15, 0.1), (0.15, 0.1)], [(0.05, 0.14), (0.1, h)], [(-0.05, 0.14), (-0.1, h)]]}


def _trousers(h: float, w: float) -> Parts:
    hips = _mirror([(0.19, 0.02), (w - 0.02, 0.22), (0.0, 0.24)])
    legs = _pair([(w - 0.02, 0.2), (w, h + 0.04), (0.07, h + 0.04), (0.0, 0.22)])
    return {"fill": [hips, *legs], "seam": [[(-0.19, 0.07), (0.19, 0.07)], [(0.0, 0.07), (0.0, 0.22)]]}


def _dungarees(h: float, w: float) -> Parts:
    parts = _trousers(h, w)
    lifted = [[(x, y * 0.8 + 0.2) for x, y in part] for part in parts["fill"]]
    bib = _mirror([(0.13, 0.06), (0.16, 0.26)])
    straps = _pair([(0.08, -0.14), (0.12, -0.14), (0.12, 0.08), (0.07, 0.08)])
    return {"fill": [*lifted, bib, *straps], "seam": [[(-0.07, 0.12), (0.07, 0.12), (0.07, 0.2), (-0.07, 0.2), (-0.07, 0.12)]]}


SILHOUETTES: dict[str, Callable[[float, float], Parts]] = {
    "t-shirt": _tshirt,
    "tank top": _tank_top,
    "hoodie": _hoodie,
    "coat": _coat,
    "kimono": _kimono,
    "poncho": _poncho,
    "dress": _dress,
    "skirt": _skirt,
    "trousers": _trousers,
    "dungarees": _dungarees,
}


def _pattern_mask(name: str, u: NDArray[np.float32], v: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.bool_] | None:
    """Where the second cloth colour shows; `u`, `v` are garment coordinates of every pixel, any shape."""
    period = rng.uniform(0.1, 0.145)
    p, q = u / period + rng.uniform(), v / period + rng.uniform()
    if name == "plain":
        return None
    if name == "striped":
        return (q % 1.0) < rng.uniform(0.36, 0.5)
    if name == "dotted":
        shifted = p + 0.5 * (np.floor(q) % 2)
        return ((shifted % 1.0 - 0.5) ** 2 + (q % 1.0 - 0.5) ** 2) < rng.uniform(0.07, 0.11)
    if name == "checked":
        return ((p * 0.8) % 1.0 < 0.5) ^ ((q * 0.8) % 1.0 < 0.5)
    if name == "zigzag":
        return ((q + np.abs((p * 0.6) % 1.0 - 0.5) * 1.6) % 1.0) < rng.uniform(0.36, 0.48)
    raise ValueError(f"unknown pattern {name!r}: expected one of plain, striped, dotted, checked, zigzag")


def _half(image: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(2H, 2W) booleans to (H, W, 1) coverage in [0, 1]."""
    height, width = (side // 2 for side in image.shape)
    return image.reshape(height, 2, width, 2).mean(axis=(1, 3), dtype=np.float32)[..., None]


def render(garment: Garment, rng: np.random.Generator, *, size: int = 96) -> Image.Image:
    """Draw `garment` as a `size` x `size` RGB photo; nuisance (pose, backdrop, light, noise) comes from `rng`.

    Masks are drawn at twice the size and averaged down, so edges are smooth; colours are composed at `size`.
    """
    side = 2 * size
    hem = _HEM[garment.length] * rng.uniform(0.95, 1.05)
    parts = SILHOUETTES[garment.shape](hem, 0.25 * rng.uniform(0.9, 1.1))

    # Pose: a similarity transform from garment to pixel coordinates, centred on the garment's bounding box.
    scale = side * rng.uniform(0.66, 0.8)
    angle = np.deg2rad(rng.uniform(-13, 13))
    centre = side * (0.5 + rng.uniform(-0.06, 0.06, size=2))
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    mid = 0.5 * hem

    def to_pixels(points: Points) -> Points:
        return [(centre[0] + scale * (cos * x - sin * (y - mid)), centre[1] + scale * (sin * x + cos * (y - mid))) for x, y in points]

    mask_image, detail_image = Image.new("L", (side, side)), Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask_image)
    for part in parts["fill"]:
        draw.polygon(to_pixels(part), fill=255)
    draw = ImageDraw.Draw(detail_image)
    for line in parts["seam"]:
        draw.line(to_pixels(line), fill=255, width=max(2, side // 80), joint="curve")
    for part in parts.get("belt", []):
        draw.polygon(to_pixels(part), fill=255)
    mask = np.asarray(mask_image.reduce(2), np.float32)[..., None] / np.float32(255)  # (size, size, 1)
    detail = np.asarray(detail_image.reduce(2), np.float32)[..., None] / 255 * mask

    # Garment coordinates of every fine pixel, slightly tilted for the cloth.
    theta = angle + rng.uniform(-0.08, 0.08)
    dx = (np.arange(side, dtype=np.float32) - centre[0]).astype(np.float32)[None, :] / np.float32(scale)
    dy = (np.arange(side, dtype=np.float32) - centre[1]).astype(np.float32)[:, None] / np.float32(scale)
    u = np.float32(np.cos(theta)) * dx + np.float32(np.sin(theta)) * dy  # (side, side)
    v = np.float32(-np.sin(theta)) * dx + np.float32(np.cos(theta)) * dy

    cloth = _cloth(garment, u, v, detail, rng)

    # Backdrop and cloth under one light; then the noise.
    xs = np.linspace(-0.5, 0.5, size, dtype=np.float32)[None, :, None]
    ys = np.linspace(-0.5, 0.5, size, dtype=np.float32)[:, None, None]
    backdrop = _backdrop(mask, xs, ys, rng)
    direction = rng.uniform(0, 2 * np.pi)
    light = 1 + np.float32(rng.uniform(0.05, 0.2)) * (np.float32(np.cos(direction)) * xs + np.float32(np.sin(direction)) * ys)
    fold_phase = u[::2, ::2, None] * np.float32(rng.uniform(2, 4)) + np.float32(0.3) * v[::2, ::2, None] + np.float32(rng.uniform())
    folds = 1 + np.float32(0.05) * np.sin(np.float32(2 * np.pi) * fold_phase) * mask
    picture = (backdrop + (cloth - backdrop) * mask) * (light * folds * np.float32(rng.uniform(0.86, 1.1)))
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(2, 7))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _cloth(
    garment: Garment, u: NDArray[np.float32], v: NDArray[np.float32], detail: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """(size, size, 3): the garment's colour and pattern everywhere, darkened (or, where it is dark, lightened) along seams and belt.

    u, v: (2 * size, 2 * size), garment coordinates. detail: (size, size, 1) in [0, 1].
    """
    size = len(detail)
    base = np.asarray(COLOURS[garment.colour], np.float32)
    base = np.clip(base * rng.uniform(0.92, 1.08) + rng.uniform(-8, 8, 3), 0, 255).astype(np.float32)
    second = _pattern_mask(garment.pattern, u, v, rng)
    if second is None:
        cloth: NDArray[np.float32] = np.broadcast_to(base, (size, size, 3))
    else:
        luma = float(base @ np.asarray((0.299, 0.587, 0.114)))
        light_trim = rng.uniform() < (0.8 if luma < 150 else 0.12)  # mostly the tone that contrasts
        mix = rng.uniform(0.62, 0.85)
        trim = (base * (1 - mix) + (245.0 if light_trim else 22.0) * mix).astype(np.float32)
        cloth = base + (trim - base) * _half(second)
    return (cloth * (1 - 0.45 * detail) if base.mean() > 60 else cloth + 70 * detail).astype(np.float32)


def _backdrop(mask: NDArray[np.float32], xs: NDArray[np.float32], ys: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """(size, size, 3): a muted wall with a gradient, at times a floor, and the shadow of the garment, whose mask is (size, size, 1)."""
    size = len(mask)
    wall = (rng.uniform(60, 235) + rng.uniform(-26, 26, 3)).astype(np.float32)
    backdrop = wall + np.float32(34 * rng.uniform(-1, 1)) * xs + np.float32(34 * rng.uniform(-1, 1)) * ys
    if rng.uniform() < 0.4:
        backdrop[int(size * rng.uniform(0.68, 0.9)) :] *= np.float32(rng.uniform(0.7, 0.92))
    offset = int(size * rng.uniform(0.01, 0.035)) + 1
    backdrop *= 1 - np.float32(0.3) * np.roll(mask, (offset, offset), axis=(0, 1))
    return backdrop
