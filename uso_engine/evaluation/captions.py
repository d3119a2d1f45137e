"""Captions by template: an object, a place, sometimes the style in words."""

from __future__ import annotations

import numpy as np

from uso_engine.evaluation.drawings import Scene

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("on a plain background", "alone on an empty background"),
    "hills": ("in the hills", "in front of rolling hills"),
    "mountains": ("in the mountains", "in front of snowy mountains"),
    "sea": ("at sea", "on the waves of the sea"),
    "city": ("in the city", "in front of city buildings"),
    "forest": ("in the forest", "among the trees of a forest"),
    "sunshine": ("in the sunshine", "under a big sun"),
    "clouds": ("in the clouds", "among white clouds"),
}
"""Place -> ways to ask for it."""

STYLE_WORDS: dict[str | None, tuple[str, ...]] = {
    None: ("in grey", "as a grey model"),
    "flat": ("in flat colours", "as a flat poster"),
    "ink": ("drawn in ink", "as an ink drawing"),
    "stripes": ("in stripes", "with a striped pattern"),
    "dots": ("in dots", "with a dotted pattern"),
    "night": ("at night", "in the dark of night"),
    "pastel": ("in pastel", "in soft pastel colours"),
    "neon": ("in neon", "as a glowing neon sign"),
    "sunset": ("at sunset", "in the light of sunset"),
    "blueprint": ("as a blueprint", "drawn as a blueprint"),
    "pixel art": ("in pixel art", "as pixel art"),
    "hatching": ("in hatching", "as a hatched drawing"),
    "stained glass": ("in stained glass", "as a stained glass window"),
}
"""Style -> ways to ask for it; None is the neutral style of content images."""


def write_caption(
    rng: np.random.Generator, scene: Scene, *, name_object: bool = True, name_place: bool = True, name_style: bool = False
) -> str:
    """Writes a caption for a scene.

    Args:
        rng: chooses among the wordings.
        scene: what is seen.
        name_object: say the kind of object; else it is "it" or is not mentioned.
        name_place: say the place.
        name_style: say the style.

    Returns:
        A phrase in lower case, without a full stop; empty where nothing is named and chance leaves "it" out.
    """
    subject = f"{rng.choice(('a', 'the'))} {scene.kind}" if name_object else str(rng.choice(("it", "the object", "")))
    words = [subject]
    if name_place:
        words.append(str(rng.choice(PLACE_WORDS[scene.place])))
    if name_style:
        words.append(str(rng.choice(STYLE_WORDS[scene.style])))
    return " ".join(word for word in words if word)
