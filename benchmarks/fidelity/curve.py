"""The plot of the training stages' losses, drawn from their logs."""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.axes import logarithmic_ticks, ticks
from benchmarks.documents import Plot

PANEL = (460, 240)
INK, FAINT, LINE = (40, 40, 40), (210, 210, 210), (170, 60, 30)
CURVES = {
    "autoencoder: mean square error": ("docs/quality/training/autoencoder.jsonl", "mse"),
    "transformer: flow loss": ("docs/quality/training/transformer.jsonl", "loss"),
    "guidance: loss": ("docs/quality/training/guidance.jsonl", "loss"),
    "style tower: loss": ("docs/quality/training/style_tower.jsonl", "loss"),
}
"""Title of a panel -> the log, and what of it is drawn."""


def read_curve(path: Path, key: str) -> list[tuple[float, float]]:
    """Minutes of the stage and the value there."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["seconds"] / 60, line[key]) for line in lines if key in line and line["step"] > 0]


def smooth(points: list[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """A running mean; a weight of 1 leaves the points as they are."""
    mean, smoothed = points[0][1], []
    for x, y in points:
        mean += weight * (y - mean)
        smoothed.append((x, mean))
    return smoothed


def draw_panel(title: str, points: list[tuple[float, float]]) -> Image.Image:
    """One curve with a logarithmic vertical axis."""
    panel = Image.new("RGB", PANEL, "white")
    pen = ImageDraw.Draw(panel)
    left, top, right, bottom = 52, 28, PANEL[0] - 12, PANEL[1] - 28
    levels = logarithmic_ticks(min(y for _, y in points), max(y for _, y in points))
    minutes = ticks(0.0, max(x for x, _ in points))
    low, high, end = math.log10(levels[0]), math.log10(levels[-1]), minutes[-1]
    scale = (right - left) / end, (bottom - top) / (high - low)
    for level in levels:
        y = bottom - (math.log10(level) - low) * scale[1]
        pen.line((left, y, right, y), fill=FAINT)
        pen.text((4, y - 6), f"{level:g}", fill=INK)
    for minute in minutes:
        pen.text((left + minute * scale[0] - 8, bottom + 6), f"{minute:g}", fill=INK)
    pen.text((right - 60, bottom + 16), "minutes", fill=INK)
    pen.text((left, 8), title, fill=INK)
    corners = [(left + x * scale[0], bottom - (math.log10(y) - low) * scale[1]) for x, y in points]
    pen.line(corners, fill=LINE, width=2)
    return panel


def draw(root: Path) -> Image.Image:
    """A panel for each curve, two side by side."""
    panels = []
    for title, (path, key) in CURVES.items():
        points = read_curve(root / path, key)
        panels.append(draw_panel(title, smooth(points, 0.15 if len(points) > 100 else 1.0)))
    sheet = Image.new("RGB", (2 * PANEL[0], PANEL[1] * math.ceil(len(panels) / 2)), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (PANEL[0] * (i % 2), PANEL[1] * (i // 2)))
    return sheet


PLOT = Plot("docs/quality/curve.png", tuple(path for path, _ in CURVES.values()), draw)
