"""A dozen drawing styles: palette x texture x outline, each with parameters of its own."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from uso_engine.evaluation.shapes import OUTLINE

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """How a picture is coloured.

    Args:
        plain: uint8 [8, 3], the colour of each role where the texture is off.
        textured: uint8 [8, 3], the colour where it is on.
        texture: name of the pattern, angle in radians, period in pixels of a 128-pixel picture.
        outline: width of the object's outline in pixels of a 128-pixel picture; 0 draws none.
        far_outline: the same for the place behind.
        ramp: colours multiplied over the picture at its top and bottom edge, 0..1, or None.
        pixels: edge of the blocks the picture is made of, 1 for none.
    """

    plain: npt.NDArray[np.uint8]
    textured: npt.NDArray[np.uint8]
    texture: tuple[str, float, float] = ("none", 0.0, 8.0)
    outline: float = 0.0
    far_outline: float = 0.0
    ramp: tuple[Colour, Colour] | None = None
    pixels: int = 1


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def _palette(*colours: Colour) -> npt.NDArray[np.uint8]:
    return np.round(np.array(colours) * 255).astype(np.uint8)


def _with(palette: npt.NDArray[np.uint8], factor: float, toward: float = 0.0) -> npt.NDArray[np.uint8]:
    shaded = palette.astype(np.float64) * factor + 255 * toward
    shaded[OUTLINE] = palette[OUTLINE]
    return np.clip(shaded, 0, 255).astype(np.uint8)


def _spread(hue: float, saturation: float, value: float, ink: Colour, sky: float = 0.97) -> npt.NDArray[np.uint8]:
    """A full palette from one hue: main, second, accent, sky, ground, detail, light, outline."""
    return _palette(
        _hsv(hue, saturation, value),
        _hsv(hue + 0.12, saturation * 0.8, value * 0.8),
        _hsv(hue + 0.45, saturation * 0.7, min(1.0, value * 1.1)),
        _hsv(hue + 0.55, saturation * 0.25, sky),
        _hsv(hue + 0.3, saturation * 0.55, value * 0.85),
        _hsv(hue + 0.6, saturation * 0.5, value * 0.8),
        _hsv(hue + 0.15, saturation * 0.2, 1.0),
        ink,
    )


def _neutral(u: Sequence[float]) -> Style:
    shade = 0.62 + 0.06 * u[0]
    greys = (shade, shade - 0.17, 0.3, 0.94, 0.8, 0.74, 0.99, 0.15)
    palette = _palette(*((g, g, g) for g in greys))
    return Style(palette, palette, outline=1.2)


def _flat(u: Sequence[float]) -> Style:
    palette = _spread(u[0], 0.85, 0.9, (0, 0, 0))
    return Style(palette, palette)


def _ink(u: Sequence[float]) -> Style:
    ink = _hsv(0.6, 0.3 * u[0], 0.1)
    paper = _hsv(0.12, 0.02 + 0.08 * u[1], 0.98)
    palette = _palette(paper, paper, ink, paper, paper, paper, paper, ink)
    return Style(palette, palette, outline=2.4 + 1.0 * u[2], far_outline=1.2)


def _stripes(u: Sequence[float]) -> Style:
    palette = _spread(u[0], 0.75, 0.85, (0, 0, 0))
    return Style(palette, _with(palette, 0.5, 0.5), ("stripes", 0.5 + 0.6 * u[1], 8 + 3 * u[2]))


def _dots(u: Sequence[float]) -> Style:
    palette = _spread(u[0], 0.6, 0.95, (0.2, 0.1, 0.1))
    return Style(palette, _with(palette, 0.55), ("dots", 0.3 + 0.5 * u[1], 8 + 2.5 * u[2]), outline=1.0)


def _night(u: Sequence[float]) -> Style:
    hue, gold = 0.6 + 0.08 * u[0], 0.11 + 0.05 * u[1]
    palette = _palette(
        _hsv(hue, 0.7, 0.42),
        _hsv(hue + 0.05, 0.7, 0.3),
        _hsv(gold, 0.7, 1.0),
        _hsv(hue, 0.8, 0.13),
        _hsv(hue, 0.75, 0.24),
        _hsv(hue, 0.6, 0.34),
        _hsv(gold, 0.45, 0.85),
        _hsv(gold, 0.3, 0.8),
    )
    return Style(palette, palette, outline=0.9)


def _pastel(u: Sequence[float]) -> Style:
    palette = _spread(u[0], 0.34, 0.97, (1, 1, 1), 0.96)
    palette[3] = np.round(np.array(_hsv(u[0] + 0.55, 0.16, 0.96)) * 255)
    palette[6] = 255
    return Style(palette, palette, ramp=((1.0, 0.97, 1.0), (0.88, 0.92, 0.95 + 0.05 * u[1])))


def _neon(u: Sequence[float]) -> Style:
    glow = _hsv(u[0], 0.9, 1.0)
    black = (0.03, 0.02, 0.06)
    palette = _palette(black, black, _hsv(u[0] + 0.35, 0.9, 1.0), black, black, black, _hsv(u[0] + 0.6, 0.9, 0.6), glow)
    return Style(palette, palette, outline=2.2 + 0.6 * u[1], far_outline=1.3)


def _sunset(u: Sequence[float]) -> Style:
    dark = 0.2 + 0.1 * u[0]
    values = (dark, dark + 0.12, 0.75, 0.84, 0.42, 0.6, 1.0, 0.0)
    palette = _palette(*((g, g, g) for g in values))
    return Style(palette, palette, ramp=(_hsv(0.83 + 0.1 * u[1], 0.55, 0.75), _hsv(0.05 + 0.08 * u[2], 0.8, 1.0)))


def _blueprint(u: Sequence[float]) -> Style:
    blue = _hsv(0.58 + 0.05 * u[0], 0.85, 0.55 + 0.15 * u[1])
    line = (0.9, 0.95, 1.0)
    palette = _palette(blue, blue, blue, blue, blue, blue, blue, line)
    return Style(palette, _with(palette, 0.85, 0.13), ("grid", 0.0, 12 + 4 * u[2]), outline=1.4, far_outline=0.9)


def _pixel_art(u: Sequence[float]) -> Style:
    palette = _spread(u[0], 0.65, 0.8, (0.1, 0.1, 0.1), 0.85)
    return Style(palette, palette, outline=2.0, pixels=4 if u[1] < 0.5 else 5)


def _hatching(u: Sequence[float]) -> Style:
    hue = 0.07 + 0.05 * u[0]
    tones = (0.75, 0.66, 0.45, 0.93, 0.8, 0.84, 0.97)
    palette = _palette(*(_hsv(hue, 0.3 + 0.1 * u[1], tone) for tone in tones), _hsv(hue, 0.6, 0.25))
    lines = _with(palette, 0.62)
    lines[3], lines[6] = palette[3], palette[6]
    return Style(palette, lines, ("hatch", 0.6 + 0.4 * u[2], 5.5), outline=1.5, far_outline=0.8)


def _stained_glass(u: Sequence[float]) -> Style:
    palette = _spread(u[0], 0.95, 0.8, (0.05, 0.05, 0.05), 0.85)
    palette[3] = np.round(np.array(_hsv(u[0] + 0.55, 0.7, 0.8)) * 255)
    return Style(palette, _with(palette, 0.72, 0.2), ("checks", 0.78, 16 + 6 * u[1]), outline=3.6, far_outline=3.0)


STYLES: dict[str, Callable[[Sequence[float]], Style]] = {
    "flat": _flat,
    "ink": _ink,
    "stripes": _stripes,
    "dots": _dots,
    "night": _night,
    "pastel": _pastel,
    "neon": _neon,
    "sunset": _sunset,
    "blueprint": _blueprint,
    "pixel art": _pixel_art,
    "hatching": _hatching,
    "stained glass": _stained_glass,
}
"""Name of a style -> the style for three parameters in 0..1."""

NEUTRAL = _neutral
"""The style of content images: greys with a thin outline, no texture."""


@functools.lru_cache(maxsize=4)
def _mesh(size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    return x, y


def draw_texture(texture: tuple[str, float, float], size: int, scale: float) -> npt.NDArray[np.bool_]:
    """Draws where a texture is on.

    Args:
        texture: name, angle in radians, period in pixels of a 128-pixel picture.
        size: edge of the square mask.
        scale: mask pixels per pixel of a 128-pixel picture.

    Returns:
        bool [size, size].
    """
    name, angle, period = texture
    x, y = _mesh(size)
    turn = np.float32(2 * math.pi / (period * scale))
    c, s = np.float32(math.cos(angle)) * turn, np.float32(math.sin(angle)) * turn
    along, across = x * c + y * s, y * c - x * s
    if name == "stripes":
        return np.asarray(np.sin(along) > 0)
    if name == "dots":
        return np.asarray(np.sin(along) * np.sin(across) > 0.45)
    if name == "grid":
        return np.asarray(np.maximum(np.cos(along), np.cos(across)) > 0.93)
    if name == "hatch":
        return np.asarray(np.sin(along) > 0.4)
    if name == "checks":
        return np.asarray(np.sin(along) * np.sin(across) > 0)
    raise ValueError(f"unknown texture {name!r}; known: stripes, dots, grid, hatch, checks")
