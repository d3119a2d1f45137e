"""Lines over a common axis as SVG, without a plotting library; and the plots of this folder, made from its records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.axes import logarithmic_ticks, ticks
from benchmarks.documents import SvgPlot
from benchmarks.records import Record, latest

_WIDTH, _HEIGHT, _LEFT, _TOP, _FOOT = 300, 190, 56, 40, 46
_COLOURS = {"ours": "#1f5fa8", "two choices": "#c46a1b", "random": "#8a8a8a"}
_OTHERS = ("#1f5fa8", "#c46a1b", "#3a8a4d", "#8a8a8a")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Lines in one frame.

    Args:
        title: above it.
        lines: points by name.
        across: what the axis across says.
        logarithmic: whether the axis upwards is.
        marks: moments across that are marked, with a word each.
    """

    title: str
    lines: Mapping[str, Points]
    across: str
    logarithmic: bool = False
    marks: Mapping[str, float] | None = None


def draw(panels: Sequence[Panel]) -> str:
    """Panels beside each other."""
    wide, high = len(panels) * (_WIDTH + _LEFT + 24) + 8, _HEIGHT + _TOP + _FOOT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
    parts = [f'{head} font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    for place, panel in enumerate(panels):
        parts += _panel(panel, _LEFT + place * (_WIDTH + _LEFT + 24))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: float) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    along_x = ticks(min(x for x, _ in points), max(x for x, _ in points))
    first, last = along_x[0], along_x[-1]
    most = max(y for _, y in points)
    along_y = logarithmic_ticks(min(y for _, y in points), most) if panel.logarithmic else ticks(0.0, most)
    low, high = along_y[0], along_y[-1]

    def at(x: float, y: float) -> str:
        return f"{left + (x - first) / (last - first) * _WIDTH:.1f},{rise(y):.1f}"

    def rise(y: float) -> float:
        share = math.log(max(y, low) / low) / math.log(high / low) if panel.logarithmic else (y - low) / (high - low)
        return _TOP + _HEIGHT * (1 - share)

    parts = [f'<text x="{left}" y="16" font-size="12" font-weight="bold">{panel.title}</text>']
    for tick in along_y:
        parts.append(f'<path d="M{left} {rise(tick):.1f}h{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{rise(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in along_x:
        across = left + (x - first) / (last - first) * _WIDTH
        parts.append(f'<text x="{across:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{left + _WIDTH / 2}" y="{_TOP + _HEIGHT + 34}" text-anchor="middle">{panel.across}</text>')
    for word, x in (panel.marks or {}).items():
        across = left + (x - first) / (last - first) * _WIDTH
        parts.append(f'<path d="M{across:.1f} {_TOP}v{_HEIGHT}" stroke="#b33" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{across + 4:.1f}" y="{_TOP + 12}" fill="#b33">{word}</text>')
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = _COLOURS.get(name, _OTHERS[number % len(_OTHERS)])
        path = " ".join(at(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{left + 6 + number * 96}" y="{_TOP - 8}" fill="{colour}">{name}</text>')
    return parts


def _cases(records: list[Record], benchmark: str) -> list[Record]:
    found = latest([record for record in records if record["benchmark"] == benchmark], "benchmark", by_machine=False)
    return list(found[-1]["cases"]) if found else []


def load_plot(records: list[Record]) -> str:
    """p95 against load, a panel for each number of replicas."""
    cases = _cases(records, "scaling_load")
    panels = []
    for count in sorted({case["replicas"] for case in cases}):
        own = [case for case in cases if case["replicas"] == count]
        rules = dict.fromkeys(case["rule"] for case in own)
        lines = {rule: [(case["load"], case["p95_s"]) for case in own if case["rule"] == rule] for rule in rules}
        panels.append(Panel(f"p95, s: {count} replicas", lines, "load", logarithmic=True))
    return draw(panels)


def zone_plot(records: list[Record]) -> str:
    """p95 and replicas over time when a third of them is lost."""
    cases = _cases(records, "scaling_zone")
    lines = {f"load {case['load']}": _over_time(case, "p95_s") for case in cases}
    there = {"replicas": _over_time(cases[0], "replicas")} if cases else {}
    marks = {"a zone is lost": cases[0]["lost_s"]} if cases else {}
    return draw([Panel("p95 of arrivals, s", lines, "seconds", marks=marks), Panel("replicas", there, "seconds", marks=marks)])


def rise_plot(records: list[Record]) -> str:
    """p95 and replicas over time when three times as much comes, and less again."""
    (case,) = _cases(records, "scaling_rise")
    p95, there = {"p95": _over_time(case, "p95_s")}, {"replicas": _over_time(case, "replicas")}
    return draw([Panel("p95 of arrivals, s", p95, "seconds"), Panel("replicas", there, "seconds")])


def _over_time(case: Record, name: str) -> list[tuple[float, float]]:
    return [(window["seconds"], window[name]) for window in case["windows"]]


PLOTS = (
    SvgPlot("docs/scaling/load.svg", ("scaling_load",), load_plot),
    SvgPlot("docs/scaling/zone.svg", ("scaling_zone",), zone_plot),
    SvgPlot("docs/scaling/rise.svg", ("scaling_rise",), rise_plot),
)
