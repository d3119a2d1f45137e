"""The frontier as a picture: quality over the arithmetic of denoising, a line for each option beside plain fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.axes import ticks
from benchmarks.documents import SvgPlot
from benchmarks.records import Record, latest

from .settings import REFERENCE

PANEL, MARGIN, TOP, BOTTOM = (300, 230), 58, 34, 92
COLOURS = ("#222222", "#c0392b", "#1f5fa8", "#2e8b57", "#b8860b", "#7d3c98", "#d2691e")
NAMES_IN_A_LINE, NAME_WIDTH, NAME_HEIGHT = 4, 255, 18
GRID = "#dddddd"


@dataclass(frozen=True)
class Panel:
    """One number of every setting.

    Args:
        title: above it.
        keys: of the record; where there are several, their mean.
        scale: what the number is multiplied by.
    """

    title: str
    keys: tuple[str, ...]
    scale: float = 1.0

    def value(self, row: Record, place: int = 0) -> float:
        """The number (0), or the lower (1) or upper (2) end of its interval, of a row."""
        return float(self.scale * sum(row[key][place] for key in self.keys) / len(self.keys))


PANELS = (
    Panel("PSNR to 28 Euler steps, dB", ("psnr_db",)),
    Panel("pictures that differ visibly, %", ("visible",), 100.0),
    Panel("object, style and place recognised, %", ("content", "style", "prompt"), 100.0),
)


def lines_of(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each option, by their arithmetic; plain Euler first."""
    found: dict[str, list[Record]] = {"euler": []}
    for row in rows:
        found.setdefault(row["option"], []).append(row)
    return {option: sorted(line, key=lambda row: float(row["denoising_gflop"])) for option, line in found.items()}


def draw(records: list[Record]) -> str:
    """The newest record of each configuration, panels side by side."""
    found = latest(records, "config", by_machine=False)
    width, height = len(PANELS) * (PANEL[0] + MARGIN) + 16, TOP + PANEL[1] + BOTTOM
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
    parts = [f'{head} font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    for record in found[-1:]:
        lines = lines_of(record["rows"])
        for place, panel in enumerate(PANELS):
            parts += _panel(panel, lines, MARGIN + place * (PANEL[0] + MARGIN))
        for place, option in enumerate(lines):
            x, colour = MARGIN + place % NAMES_IN_A_LINE * NAME_WIDTH, COLOURS[place % len(COLOURS)]
            y = height - 32 + place // NAMES_IN_A_LINE * NAME_HEIGHT
            name = "fewer Euler steps" if option == "euler" else option
            parts.append(f'<path d="M{x} {y}h22" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<text x="{x + 28}" y="{y + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, lines: dict[str, list[Record]], left: int) -> list[str]:
    """One panel: axes from what is shown, a point with its interval for every setting."""
    rows = [row for line in lines.values() for row in line if row["name"] != REFERENCE.name]
    most = max(float(row["denoising_gflop"]) for line in lines.values() for row in line)
    low, high = min(panel.value(row, 1) for row in rows), max(panel.value(row, 2) for row in rows)
    across, upwards = ticks(0.0, most), ticks(low, high)
    first, span = upwards[0], upwards[-1] - upwards[0]

    def at(gflop: float, value: float) -> str:
        clipped = min(max(value, low), high)
        return f"{left + PANEL[0] * gflop / across[-1]:.1f},{TOP + PANEL[1] * (1 - (clipped - first) / span):.1f}"

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{panel.title}</text>']
    for value in upwards:
        y = TOP + PANEL[1] * (1 - (value - first) / span)
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL[0]}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for gflop in across:
        x = left + PANEL[0] * gflop / across[-1]
        parts.append(f'<text x="{x:.1f}" y="{TOP + PANEL[1] + 16}" text-anchor="middle">{gflop:g}</text>')
    parts.append(f'<text x="{left + PANEL[0]}" y="{TOP + PANEL[1] + 32}" text-anchor="end">GFLOP of denoising</text>')
    for place, line in enumerate(lines.values()):
        colour = COLOURS[place % len(COLOURS)]
        # The reference is infinitely near to itself.
        drawn = [row for row in line if row["name"] != REFERENCE.name or panel.keys[0] != "psnr_db"]
        shown = [(float(row["denoising_gflop"]), row) for row in drawn]
        points = " ".join(at(gflop, panel.value(row)) for gflop, row in shown)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for gflop, row in shown:
            x_at, y_at = at(gflop, panel.value(row)).split(",")
            lower, upper = (at(gflop, panel.value(row, end)).split(",")[1] for end in (1, 2))
            parts.append(f'<path d="M{x_at} {lower}V{upper}" stroke="{colour}" stroke-width="0.7"/>')
            parts.append(f'<circle cx="{x_at}" cy="{y_at}" r="2.5" fill="{colour}"/>')
    return parts


PLOT = SvgPlot("docs/quality/frontier.svg", ("frontier",), draw)
