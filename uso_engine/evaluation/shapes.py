"""Outlines of a dozen kinds of object and eight places, as polygons with roles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
"""Corners of one polygon, [n, 2], x to the right and y down."""

Polygon = tuple[int, Points]
"""A role (which colour of a style's palette fills it) and the polygon."""

MAIN, SECOND, ACCENT, SKY, GROUND, DETAIL, LIGHT, OUTLINE = range(8)
"""Roles: three of the object, four of the place, and every outline."""


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, end: float = 2 * math.pi, n: int = 22) -> Points:
    angles = np.linspace(start, end, n)
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _poly(*corners: tuple[float, float]) -> Points:
    return np.array(corners)


def _ring(cx: float, cy: float, outer: float, inner: float, start: float, end: float) -> Points:
    return np.concatenate([_ellipse(cx, cy, outer, outer, start, end, 14), _ellipse(cx, cy, inner, inner, end, start, 14)])


def _mushroom(v: Sequence[float]) -> list[Polygon]:
    stem, wide, high = 0.16 + 0.16 * v[0], 0.65 + 0.33 * v[1], 0.55 + 0.4 * v[2]
    foot = stem * (0.9 + 0.6 * v[3])
    spots = [
        _ellipse(x * wide, 0.02 - high * y, 0.13 * wide, 0.12 * high, n=10)
        for x, y in ((-0.5, 0.35), (0.05, 0.66), (0.52, 0.3))
    ]
    return [
        (SECOND, _poly((-stem, 0.0), (stem, 0.0), (foot, 0.95), (-foot, 0.95))),
        (MAIN, _ellipse(0, 0.05, wide, high, math.pi, 2 * math.pi)),
        *((ACCENT, spot) for spot in spots),
    ]


def _fish(v: Sequence[float]) -> list[Polygon]:
    long, high, tail = 0.58 + 0.17 * v[0], 0.3 + 0.27 * v[1], 0.25 + 0.3 * v[2]
    return [
        (SECOND, _poly((-long * 0.75, 0.0), (-0.98, -tail), (-0.85, 0.0), (-0.98, tail))),
        (SECOND, _poly((-0.2, -high * 0.8), (0.1 - 0.3 * v[3], -high - 0.3), (0.3, -high * 0.7))),
        (MAIN, _ellipse(0.1, 0, long, high)),
        (ACCENT, _poly((-0.05, 0.02), (-0.35, 0.2 + 0.1 * v[3]), (0.02, 0.22))),
        (ACCENT, _ellipse(0.1 + long * 0.6, -high * 0.25, 0.08, 0.08, n=10)),
    ]


def _house(v: Sequence[float]) -> list[Polygon]:
    wide, wall, peak = 0.5 + 0.3 * v[0], -0.25 + 0.3 * v[1], -0.95 + 0.25 * v[2]
    return [
        (MAIN, _box(-wide, wall, wide, 0.9)),
        (SECOND, _poly((-wide - 0.15, wall), (0.3 * (v[3] - 0.5), peak), (wide + 0.15, wall))),
        (ACCENT, _box(-wide * 0.7, 0.35, -wide * 0.2, 0.9)),
        (ACCENT, _box(wide * 0.15, wall + 0.2, wide * 0.7, wall + 0.55)),
    ]


def _star(v: Sequence[float]) -> list[Polygon]:
    points, inner = 5 + int(v[0] * 2.99), 0.36 + 0.22 * v[1]
    angles = -math.pi / 2 + np.arange(2 * points) * math.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 0.98)
    hub = 0.12 + 0.15 * v[2]
    return [
        (MAIN, np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)),
        (ACCENT, _ellipse(0, 0, hub, hub, n=14)),
    ]


def _cup(v: Sequence[float]) -> list[Polygon]:
    top, foot, high = 0.5 + 0.18 * v[0], 0.28 + 0.22 * v[1], 0.5 + 0.35 * v[2]
    band = -high * (0.5 - 0.6 * v[3])
    return [
        (SECOND, _ring(top * 0.8, -0.05, 0.42, 0.25, -math.pi / 2, math.pi / 2)),
        (MAIN, _poly((-top, -high), (top, -high), (foot, high), (-foot, high))),
        (ACCENT, _box(-foot - 0.05, band, foot + 0.05, band + 0.22)),
        (SECOND, _ellipse(0, -high, top, 0.13, n=16)),
    ]


def _tree(v: Sequence[float]) -> list[Polygon]:
    trunk = 0.09 + 0.1 * v[0]
    parts: list[Polygon] = [(SECOND, _box(-trunk, 0.2, trunk, 0.97))]
    wide = 0.5 + 0.25 * v[1]
    if v[3] < 0.5:
        tiers = ((0.45, 1.0), (0.05, 0.8), (-0.35, 0.58))
        parts += [(MAIN, _poly((-wide * s, y), (0.0, y - 0.62), (wide * s, y))) for y, s in tiers]
        return [*parts, (ACCENT, _ellipse(0, -0.95, 0.09, 0.09, n=10))]
    r = 0.36 + 0.12 * v[2]
    parts += [(MAIN, _ellipse(x * wide, y, r, r)) for x, y in ((-0.65, 0.05), (0.65, 0.05), (0.0, -0.42))]
    return [*parts, *((ACCENT, _ellipse(x, y, 0.09, 0.09, n=10)) for x, y in ((-0.35, 0.1), (0.32, 0.0), (0.0, -0.45)))]


def _boat(v: Sequence[float]) -> list[Polygon]:
    deck, keel, mast = 0.8 + 0.15 * v[0], 0.4 + 0.2 * v[1], -0.75 - 0.2 * v[2]
    return [
        (ACCENT, _box(-0.05, mast, 0.04, 0.42)),
        (SECOND, _poly((0.08, mast + 0.08), (0.35 + 0.4 * v[3], 0.3), (0.08, 0.3))),
        (SECOND, _poly((-0.1, mast + 0.25), (-0.25 - 0.3 * v[3], 0.3), (-0.1, 0.3))),
        (MAIN, _poly((-deck, 0.4), (deck, 0.4), (keel, 0.85), (-keel, 0.85))),
    ]


def _flower(v: Sequence[float]) -> list[Polygon]:
    petals, reach, size = 5 + int(v[0] * 3.99), 0.34 + 0.08 * v[1], 0.17 + 0.07 * v[2]
    angles = np.arange(petals) * 2 * math.pi / petals
    parts: list[Polygon] = [
        (SECOND, _box(-0.05, -0.1, 0.05, 0.97)),
        (SECOND, _poly((0.0, 0.75), (0.4 + 0.2 * v[3], 0.4), (0.12, 0.42))),
        (SECOND, _poly((0.0, 0.9), (-0.4 - 0.2 * v[3], 0.55), (-0.12, 0.55))),
    ]
    parts += [(MAIN, _ellipse(reach * math.cos(a), -0.38 + reach * math.sin(a), size, size, n=14)) for a in angles]
    return [*parts, (ACCENT, _ellipse(0, -0.38, 0.2, 0.2, n=16))]


def _car(v: Sequence[float]) -> list[Polygon]:
    roof, cabin, wheel = -0.4 - 0.2 * v[0], 0.4 + 0.2 * v[1], 0.2 + 0.07 * v[2]
    return [
        (MAIN, _poly((-cabin - 0.2, 0.05), (-cabin + 0.1, roof), (cabin - 0.2 * v[3], roof), (cabin + 0.15, 0.05))),
        (SECOND, _poly((-cabin, 0.0), (-cabin + 0.18, roof + 0.12), (-0.06, roof + 0.12), (-0.06, 0.0))),
        (SECOND, _poly((0.06, 0.0), (0.06, roof + 0.12), (cabin - 0.08 - 0.15 * v[3], roof + 0.12), (cabin, 0.0))),
        (MAIN, _poly((-0.97, 0.02), (0.85, 0.02), (0.98, 0.2), (0.98, 0.48), (-0.97, 0.48))),
        (ACCENT, _ellipse(-0.5, 0.5, wheel, wheel, n=16)),
        (ACCENT, _ellipse(0.52, 0.5, wheel, wheel, n=16)),
    ]


def _cat(v: Sequence[float]) -> list[Polygon]:
    wide, high, ear = 0.68 + 0.2 * v[0], 0.58 + 0.15 * v[1], 0.75 + 0.2 * v[2]
    eye = 0.09 + 0.07 * v[3]
    return [
        (MAIN, _poly((-wide * 0.95, 0.0), (-wide * 0.85, -ear), (-0.1, -0.35))),
        (MAIN, _poly((wide * 0.95, 0.0), (wide * 0.85, -ear), (0.1, -0.35))),
        (MAIN, _ellipse(0, 0.15, wide, high)),
        (ACCENT, _ellipse(-wide * 0.42, 0.02, eye, 0.15, n=12)),
        (ACCENT, _ellipse(wide * 0.42, 0.02, eye, 0.15, n=12)),
        (SECOND, _poly((-0.13, 0.25), (0.13, 0.25), (0.0, 0.42))),
        (SECOND, _box(-0.22, 0.5, 0.22, 0.57)),
    ]


def _umbrella(v: Sequence[float]) -> list[Polygon]:
    wide, high = 0.75 + 0.22 * v[0], 0.6 + 0.25 * v[1]
    inner = wide * (0.25 + 0.2 * v[2])
    return [
        (SECOND, _box(-0.05, -0.1, 0.05, 0.75)),
        (SECOND, _ring(0.2, 0.72, 0.25, 0.13, 0.0, math.pi)),
        (MAIN, _ellipse(0, 0, wide, high, math.pi, 2 * math.pi)),
        (ACCENT, _ellipse(0, 0, inner, high, math.pi, 2 * math.pi, n=16)),
        (SECOND, _box(-0.05, -high - 0.13, 0.05, -high + 0.02)),
    ]


def _rocket(v: Sequence[float]) -> list[Polygon]:
    wide, fin, nose = 0.24 + 0.13 * v[0], 0.25 + 0.2 * v[1], -0.5 + 0.2 * v[2]
    return [
        (ACCENT, _poly((-wide * 0.6, 0.55), (0.0, 0.82 + 0.16 * v[3]), (wide * 0.6, 0.55))),
        (SECOND, _poly((-wide, 0.1), (-wide - fin, 0.7), (-wide, 0.55))),
        (SECOND, _poly((wide, 0.1), (wide + fin, 0.7), (wide, 0.55))),
        (MAIN, _box(-wide, nose, wide, 0.57)),
        (SECOND, _poly((-wide, nose), (0.0, -0.98), (wide, nose))),
        (ACCENT, _ellipse(0, nose + 0.32, wide * 0.55, wide * 0.55, n=14)),
    ]


OBJECTS: dict[str, Callable[[Sequence[float]], list[Polygon]]] = {
    "mushroom": _mushroom,
    "fish": _fish,
    "house": _house,
    "star": _star,
    "cup": _cup,
    "tree": _tree,
    "boat": _boat,
    "flower": _flower,
    "car": _car,
    "cat": _cat,
    "umbrella": _umbrella,
    "rocket": _rocket,
}
"""Kind of object -> its parts, back to front, in a box of -1..1, for four shape numbers in 0..1."""


def _hills(v: Sequence[float]) -> list[Polygon]:
    x = np.linspace(-1.05, 1.05, 26)
    parts: list[Polygon] = []
    for role, base, swing, phase in ((DETAIL, 0.2, 0.3, 6.3 * v[0]), (GROUND, 0.55, 0.18, 6.3 * v[1] + 2)):
        top = np.stack([x, base + swing * np.sin(x * (3.2 + v[2]) + phase)], axis=1)
        parts.append((role, np.concatenate([top, [(1.05, 1.1), (-1.05, 1.1)]])))
    return parts


def _mountains(v: Sequence[float]) -> list[Polygon]:
    parts: list[Polygon] = []
    for x, y in ((-0.62, -0.45 + 0.3 * v[0]), (0.6, -0.65 + 0.3 * v[1])):
        parts.append((DETAIL, _poly((x - 0.65, 0.6), (x, y), (x + 0.65, 0.6))))
        parts.append((LIGHT, _poly((x - 0.17, y + 0.28), (x, y), (x + 0.17, y + 0.28))))
    return [*parts, (GROUND, _box(-1.1, 0.55, 1.1, 1.1))]


def _sea(v: Sequence[float]) -> list[Polygon]:
    parts: list[Polygon] = [(GROUND, _box(-1.1, -0.05 + 0.2 * v[0], 1.1, 1.1))]
    x = np.linspace(-1.05, 1.05, 30)
    for row in range(4):
        y = 0.28 + 0.22 * row + 0.05 * np.sin(x * (9 + 3 * v[1]) + 6.3 * v[2] + row)
        line = np.stack([x, y], axis=1)
        parts.append((LIGHT, np.concatenate([line, line[::-1] + np.array((0, 0.07))])))
    return parts


def _city(v: Sequence[float]) -> list[Polygon]:
    heights = (0.15, -0.35, 0.05, 0.25, -0.15, -0.55, 0.1)
    parts: list[Polygon] = []
    for i, height in enumerate(heights):
        x, top = -1.05 + 0.3 * i, height + 0.25 * v[i % 4]
        parts.append((DETAIL, _box(x, top, x + 0.28, 0.75)))
        parts += [(LIGHT, _box(x + 0.09, y, x + 0.19, y + 0.1)) for y in np.arange(top + 0.1, 0.6, 0.22)]
    return [*parts, (GROUND, _box(-1.1, 0.72, 1.1, 1.1))]


def _forest(v: Sequence[float]) -> list[Polygon]:
    parts: list[Polygon] = [(GROUND, _box(-1.1, 0.62 + 0.1 * v[0], 1.1, 1.1))]
    for i in range(5):
        x = -0.95 + 0.46 * i + 0.15 * v[i % 4]
        wide = 0.06 + 0.05 * v[(i + 1) % 4]
        parts.append((DETAIL, _poly((x - wide, -1.1), (x + wide, -1.1), (x + wide * 1.4, 0.8), (x - wide * 1.4, 0.8))))
    return parts


def _sunshine(v: Sequence[float]) -> list[Polygon]:
    x, y, r = (-0.72 if v[0] < 0.5 else 0.72), -0.72, 0.3 + 0.12 * v[1]
    parts: list[Polygon] = [(GROUND, _box(-1.1, 0.7 + 0.1 * v[2], 1.1, 1.1))]
    for angle in np.arange(12) * math.pi / 6 + v[3]:
        c, s = math.cos(angle), math.sin(angle)
        parts.append(
            (
                LIGHT,
                _poly(
                    (x + r * c - 0.07 * s, y + r * s + 0.07 * c),
                    (x + 1.9 * r * c, y + 1.9 * r * s),
                    (x + r * c + 0.07 * s, y + r * s - 0.07 * c),
                ),
            )
        )
    return [*parts, (LIGHT, _ellipse(x, y, r * 0.9, r * 0.9))]


def _clouds(v: Sequence[float]) -> list[Polygon]:
    parts: list[Polygon] = []
    for i, (x, y) in enumerate(((-0.65, -0.72), (0.45, -0.8), (0.75, -0.15), (-0.85, 0.0), (-0.2, 0.85), (0.7, 0.75))):
        cx, cy = x + 0.25 * (v[i % 4] - 0.5), y + 0.15 * (v[(i + 1) % 4] - 0.5)
        puffs = ((-0.2, 0.04, 0.15), (0.2, 0.04, 0.15), (0.0, -0.04, 0.2))
        parts += [(LIGHT, _ellipse(cx + dx, cy + dy, r, r * 0.85, n=14)) for dx, dy, r in puffs]
    return parts


def _plain(v: Sequence[float]) -> list[Polygon]:
    return []


PLACES: dict[str, Callable[[Sequence[float]], list[Polygon]]] = {
    "plain": _plain,
    "hills": _hills,
    "mountains": _mountains,
    "sea": _sea,
    "city": _city,
    "forest": _forest,
    "sunshine": _sunshine,
    "clouds": _clouds,
}
"""Place -> what stands behind the object, over a sky that fills -1..1, for four shape numbers in 0..1."""
