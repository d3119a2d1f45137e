"""Drawings are decided by their seed, differ where they should, and held-out triplets stay held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from uso_engine.evaluation.captions import PLACE_WORDS, STYLE_WORDS, write_caption
from uso_engine.evaluation.drawings import KINDS, PLACE_NAMES, STYLE_NAMES, Scene, draw_scene, draw_triplet, render
from uso_engine.evaluation.styles import draw_texture


def scene(**changes: object) -> Scene:
    base = draw_scene(np.random.default_rng(3), kind="fish", place="sea", style="flat")
    return replace(base, **changes)  # type: ignore[arg-type]


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = (render(draw_triplet(np.random.default_rng(5)).target) for _ in range(2))
    assert difference(first, second) == 0
    assert difference(first, render(draw_triplet(np.random.default_rng(6)).target)) > 5


@pytest.mark.parametrize("size", [64, 128, 256])
def test_pictures_have_the_size_asked_for(size: int) -> None:
    picture = render(scene(), size)
    assert (picture.size, picture.mode) == ((size, size), "RGB")


def test_every_kind_place_and_style_looks_different() -> None:
    for field, values in (("kind", KINDS), ("place", PLACE_NAMES), ("style", (*STYLE_NAMES, None))):
        pictures = [render(scene(**{field: value})) for value in values]
        for i, a in enumerate(pictures):
            for j, b in enumerate(pictures[:i]):
                assert difference(a, b) > 1, (field, values[i], values[j])


def test_shape_pose_and_style_numbers_change_the_picture() -> None:
    plain = render(scene())
    for changes in (
        {"shape": (0.9, 0.1, 0.9, 0.1)},
        {"pose": (0.1, 0.0, 0.6, 0.2, -1.0)},
        {"place_shape": (0.1, 0.9, 0.1, 0.9)},
        {"style_shape": (0.1, 0.2, 0.3)},
    ):
        assert difference(plain, render(scene(**changes))) > 0.5, changes


def test_a_triplets_target_is_its_content_in_its_style() -> None:
    for seed in range(50):
        triplet = draw_triplet(np.random.default_rng(seed))
        content, style, target = triplet.content, triplet.style, triplet.target
        assert content.style is None
        assert style.kind != content.kind
        assert (target.kind, target.shape, target.pose) == (content.kind, content.shape, content.pose)
        assert (target.style, target.style_shape) == (style.style, style.style_shape)


def test_captions_name_what_they_are_told_to() -> None:
    rng = np.random.default_rng(0)
    for place in PLACE_NAMES:
        for style in (*STYLE_NAMES, None):
            drawn = scene(place=place, style=style)
            caption = write_caption(rng, drawn, name_style=True)
            assert "fish" in caption
            assert any(words in caption for words in PLACE_WORDS[place])
            assert any(words in caption for words in STYLE_WORDS[style])
            bare = write_caption(rng, drawn, name_object=False, name_place=False)
            assert bare in ("it", "the object", "")


def test_an_unknown_texture_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="plaid"):
        draw_texture(("plaid", 0.0, 8.0), 32, 1.0)
