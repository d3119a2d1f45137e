"""Seeded drawings for training and for judging: one object, one place, one style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from uso_engine.evaluation.shapes import OBJECTS, OUTLINE, PLACES, SKY, Points
from uso_engine.evaluation.styles import NEUTRAL, STYLES, Style, draw_texture

KINDS = tuple(OBJECTS)
STYLE_NAMES = tuple(STYLES)
PLACE_NAMES = tuple(PLACES)

_OVERSAMPLING = 2


@dataclass(frozen=True)
class Scene:
    """Everything that decides a drawing.

    Args:
        kind: one of KINDS.
        shape: four numbers in 0..1, the variation of the object.
        pose: centre x and y in -1..1, half the object's size, turn in radians, 1 or -1 for a mirrored object.
        place: one of PLACE_NAMES.
        place_shape: four numbers in 0..1, the variation of the place.
        style: one of STYLE_NAMES, or None for the neutral style of content images.
        style_shape: three numbers in 0..1, the variation of the style.
    """

    kind: str
    shape: tuple[float, ...]
    pose: tuple[float, float, float, float, float]
    place: str
    place_shape: tuple[float, ...]
    style: str | None
    style_shape: tuple[float, ...]


@dataclass(frozen=True)
class Triplet:
    """What USO is about: the object of one picture in the style of another, in the place that is asked for."""

    content: Scene
    style: Scene
    target: Scene


def _uniform(rng: np.random.Generator, count: int) -> tuple[float, ...]:
    return tuple(float(x) for x in rng.random(count))


def draw_scene(rng: np.random.Generator, *, kind: str | None = None, place: str | None = None, style: str | None = "") -> Scene:
    """Draws a scene by lot.

    Args:
        rng: source of chance.
        kind: one of KINDS, None for any.
        place: one of PLACE_NAMES, None for any.
        style: one of STYLE_NAMES, None for the neutral style, "" for any but neutral.

    Returns:
        The scene.
    """
    pose = (
        float(rng.uniform(-0.18, 0.18)),
        float(rng.uniform(-0.1, 0.22)),
        float(rng.uniform(0.55, 0.72)),
        float(rng.uniform(-0.25, 0.25)),
        float(rng.choice((-1.0, 1.0))),
    )
    return Scene(
        kind=kind or str(rng.choice(KINDS)),
        shape=_uniform(rng, 4),
        pose=pose,
        place=place or str(rng.choice(PLACE_NAMES)),
        place_shape=_uniform(rng, 4),
        style=str(rng.choice(STYLE_NAMES)) if style == "" else style,
        style_shape=_uniform(rng, 3),
    )


def draw_triplet(rng: np.random.Generator) -> Triplet:
    """Draws content, style and target scenes by lot: the style picture shows another object in another place."""
    content = draw_scene(rng, style=None, place="plain" if rng.random() < 0.5 else None)
    other = str(rng.choice([kind for kind in KINDS if kind != content.kind]))
    style = draw_scene(rng, kind=other)
    place = str(rng.choice(PLACE_NAMES))
    shape = content.place_shape if place == content.place else _uniform(rng, 4)
    target = replace(content, style=style.style, style_shape=style.style_shape, place=place, place_shape=shape)
    return Triplet(content, style, target)


def _placed(points: Points, scene: Scene, size: int) -> list[tuple[float, float]]:
    x, y, half, turn, mirror = scene.pose
    c, s = math.cos(turn) * half, math.sin(turn) * half
    turned = np.stack([mirror * (points[:, 0] * c - points[:, 1] * s) + x, points[:, 0] * s + points[:, 1] * c + y], axis=1)
    return _on_canvas(turned, size)


def _on_canvas(points: Points, size: int) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in (points + 1) * (size / 2)]


def _fill(pen: ImageDraw.ImageDraw, role: int, corners: Sequence[tuple[float, float]], width: int) -> None:
    pen.polygon(corners, fill=role)
    if width:
        pen.line([*corners, corners[0], corners[1]], fill=OUTLINE, width=width, joint="curve" if width > 3 else None)


def _colour(roles: npt.NDArray[np.uint8], style: Style, scale: float) -> npt.NDArray[np.uint8]:
    if style.texture[0] == "none":
        return style.plain[roles]
    table = np.concatenate([style.plain, style.textured])
    on = draw_texture(style.texture, roles.shape[0], scale)
    return np.asarray(table[roles + on.view(np.uint8) * 8])


def _finish(picture: Image.Image, style: Style) -> Image.Image:
    size = picture.width
    if style.pixels > 1:
        blocks = round(size / (style.pixels * size / 128))
        picture = picture.resize((blocks, blocks), Image.Resampling.BOX).resize((size, size), Image.Resampling.NEAREST)
    if style.ramp is not None:
        down = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
        top, bottom = (np.array(colour, dtype=np.float32) for colour in style.ramp)
        picture = Image.fromarray((np.asarray(picture) * (top + (bottom - top) * down)).astype(np.uint8))
    return picture


def render(scene: Scene, size: int = 128) -> Image.Image:
    """Renders a scene.

    Args:
        scene: what to draw.
        size: edge of the square picture in pixels.

    Returns:
        RGB picture, the same on every machine for the same scene and Pillow version.
    """
    style = NEUTRAL(scene.style_shape) if scene.style is None else STYLES[scene.style](scene.style_shape)
    canvas = size * _OVERSAMPLING
    scale = canvas / 128
    roles = Image.new("L", (canvas, canvas), SKY)
    pen = ImageDraw.Draw(roles)
    for role, points in PLACES[scene.place](scene.place_shape):
        _fill(pen, role, _on_canvas(points, canvas), round(style.far_outline * scale))
    for role, points in OBJECTS[scene.kind](scene.shape):
        _fill(pen, role, _placed(points, scene, canvas), round(style.outline * scale))
    picture = Image.fromarray(_colour(np.asarray(roles), style, scale))
    return _finish(picture.reduce(_OVERSAMPLING), style)
