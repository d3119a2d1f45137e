"""Time against tokens and against pictures, with the fitted curves, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from benchmarks.axes import ticks
from benchmarks.documents import SvgPlot
from benchmarks.records import Record

from .tables import current, runs, ways_of

COLOURS = ("#1f5fa8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#555555", "#117a8b")
WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 260, 70, 44, 90
Point = tuple[float, float]
Curve = Callable[[float], float]


def step_points(records: Sequence[Record], way: str) -> list[Point]:
    """Tokens and milliseconds of a step, of every case of one picture."""
    return sorted((r["tokens"], r["step_ms"]["median_ms"]) for r in records if r["way"] == way and r["images"] == 1)


def request_points(records: Sequence[Record], way: str) -> list[Point]:
    """Pictures and seconds of a request, of the cases that differ in nothing else."""
    several = {r["case"].partition("-")[0] for r in records if r["images"] > 1}
    alike = [r for r in records if r["way"] == way and r["case"].partition("-")[0] in several and "content-style" in r["case"]]
    return sorted((r["images"], r["request_ms"]["median_ms"] / 1e3) for r in alike)


def fit_tokens(records: Sequence[Record], way: str) -> tuple[float, float] | None:
    """b and c of ms = b L + c L² / 1000: products grow with L, attention with its square; None under three points."""
    points = step_points(records, way)
    if len({x for x, _ in points}) < 3:
        return None
    x, y = np.array(points).T
    # Relative distances: the fit is to hold for short sequences too.
    b, c = np.linalg.lstsq(np.stack((x, x**2 / 1000), axis=1) / y[:, None], np.ones_like(y), rcond=None)[0]
    return float(b), float(c)


def fit_batch(records: Sequence[Record], way: str) -> tuple[float, float] | None:
    """a and b of s = a + b n; None under three numbers of pictures."""
    points = request_points(records, way)
    if len({x for x, _ in points}) < 3:
        return None
    x, y = np.array(points).T
    a, b = np.linalg.lstsq(np.stack((np.ones_like(x), x), axis=1) / y[:, None], np.ones_like(y), rcond=None)[0]
    return float(a), float(b)


def draw(records: list[Record]) -> str:
    """A row of two panels for every machine, size and type of which there is more than a point."""
    found = {key: own for key, own in runs(current(records)).items() if _has_curve(own)}
    height = max(1, len(found)) * (HEIGHT + GAP) + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (WIDTH + LEFT) + 200}" height="{height}"'
    parts = [f'{head} font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    if not found:
        parts.append(f'<text x="{LEFT}" y="{TOP}">Pending: not measured yet.</text>')
    for row, ((machine, size, dtype), own) in enumerate(found.items()):
        top, ways = TOP + row * (HEIGHT + GAP), ways_of(own)
        parts.append(f'<text x="{LEFT}" y="{top - 24}" font-weight="bold">{escape(f"{machine}, {size}, {dtype}")}</text>')
        tokens = {way: (step_points(own, way), _tokens_curve(fit_tokens(own, way))) for way in ways}
        pictures = {way: (request_points(own, way), _batch_curve(fit_batch(own, way))) for way in ways}
        parts += panel(LEFT, top, "ms a step", "tokens L", tokens)
        parts += panel(2 * LEFT + WIDTH, top, "s a request", "pictures n", pictures)
        parts += legend(2 * (LEFT + WIDTH) + 14, top, ways)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _has_curve(records: Sequence[Record]) -> bool:
    """Whether requests of one way differ in their length or in their number of pictures."""
    way = ways_of(records)[0]
    return any(len({x for x, _ in points(records, way)}) > 1 for points in (step_points, request_points))


def _tokens_curve(fitted: tuple[float, float] | None) -> Curve | None:
    return None if fitted is None else lambda x: fitted[0] * x + fitted[1] * x**2 / 1000


def _batch_curve(fitted: tuple[float, float] | None) -> Curve | None:
    return None if fitted is None else lambda x: fitted[0] + fitted[1] * x


def panel(left: int, top: int, up: str, along: str, lines: dict[str, tuple[list[Point], Curve | None]]) -> list[str]:
    """Points and curves of every way over axes that begin at 0."""
    points = [point for own, _ in lines.values() for point in own]
    frame = f'<path d="M{left} {top}v{HEIGHT}h{WIDTH}" fill="none" stroke="#999"/>'
    labels = f'<text x="{left}" y="{top - 8}">{up}</text>'
    labels += f'<text x="{left + WIDTH}" y="{top + HEIGHT + 34}" text-anchor="end">{along}</text>'
    if len({x for x, _ in points}) < 2:
        return [frame, labels, f'<text x="{left + 20}" y="{top + HEIGHT / 2}">Pending: not measured yet.</text>']
    last = max(x for x, _ in points)
    along_x, along_y = ticks(0.0, last), ticks(0.0, max(y for _, y in points))
    across, upwards = WIDTH / along_x[-1], HEIGHT / along_y[-1]
    parts = [frame, labels]
    for x in along_x:
        parts.append(f'<text x="{left + x * across:.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{x:g}</text>')
    for y in along_y:
        parts.append(f'<text x="{left - 6}" y="{top + HEIGHT - y * upwards + 4:.1f}" text-anchor="end">{y:g}</text>')
    for colour, (own, curve) in zip(_colours(len(lines)), lines.values(), strict=True):
        for x, y in own:
            parts.append(
                f'<circle cx="{left + x * across:.1f}" cy="{top + HEIGHT - y * upwards:.1f}" r="3.5" fill="{colour}"/>'
            )
        if curve is not None:
            first = min(x for x, _ in own)
            steps = [first + (last - first) * i / 40 for i in range(41)]
            corners = " ".join(f"{left + x * across:.1f},{top + HEIGHT - curve(x) * upwards:.1f}" for x in steps)
            parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return parts


def legend(left: int, top: int, names: Sequence[str]) -> list[str]:
    """Which colour is whose."""
    return [
        f'<circle cx="{left}" cy="{top + 8 + 20 * i}" r="4" fill="{colour}"/>'
        f'<text x="{left + 10}" y="{top + 12 + 20 * i}">{escape(name)}</text>'
        for i, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True))
    ]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


PLOT = SvgPlot("docs/compare.svg", ("compare",), draw)
