"""Curves over time as SVG, one panel each, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.axes import ticks

_WIDTH, _HEIGHT, _LEFT, _GAP = 720, 110, 80, 34


def draw(samples: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """A picture.

    Args:
        samples: values at moments; each has ``seconds``.
        names: which values, from the top.
    """
    height = len(names) * (_HEIGHT + _GAP) + 30
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + _LEFT + 20}" height="{height}" font-family="sans-serif"'
    parts = [f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    minutes = ticks(0.0, max(sample["seconds"] for sample in samples) / 60)
    end = 60 * minutes[-1]
    for place, name in enumerate(names):
        values = [sample[name] for sample in samples]
        top, most = place * (_HEIGHT + _GAP) + 24, ticks(0.0, max(values))[-1]
        points = " ".join(
            f"{_LEFT + sample['seconds'] / end * _WIDTH:.1f},{top + _HEIGHT - value / most * _HEIGHT:.1f}"
            for sample, value in zip(samples, values, strict=True)
        )
        parts += [
            f'<text x="{_LEFT}" y="{top - 6}">{name}</text>',
            f'<text x="{_LEFT - 8}" y="{top + 10}" text-anchor="end">{most:g}</text>',
            f'<text x="{_LEFT - 8}" y="{top + _HEIGHT}" text-anchor="end">0</text>',
            f'<path d="M{_LEFT} {top}v{_HEIGHT}h{_WIDTH}" fill="none" stroke="#999"/>',
            f'<polyline points="{points}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>',
        ]
    for minute in minutes:
        x = _LEFT + minute / minutes[-1] * _WIDTH
        said = f"{minute:g} minutes" if minute == minutes[-1] else f"{minute:g}"
        parts.append(
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{"end" if minute == minutes[-1] else "middle"}">{said}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
