"""Seeded captions in the manner of uso-tiny's training data, from which its tokenizers are trained."""

from __future__ import annotations

import random
from collections.abc import Iterator

from uso_engine.embedded.vocabulary import (
    ADJECTIVES,
    COLORS,
    FUNCTION_WORDS,
    INSTRUCTIONS,
    NOUNS,
    OBJECTS,
    PLACES,
    PREPOSITIONS,
    STYLES,
    VERBS,
)

_TEMPLATES = (
    "a {adjective} {object} {preposition} the {place}",
    "a {object} {preposition} a {adjective} {place}, {style} style",
    "a {color} {object} in {style} style",
    "{style} {noun} of a {object}",
    "{style} {noun} of a {object} {preposition} a {place}",
    "the {object} {verb} {preposition} the {place}",
    "a {adjective} {noun} {verb} with the {color} {object}",
    "a {object} with a {color} background",
    "a {color} {object} on a {color2} background, {adjective} {noun}",
    "{instruction} the {object} in the style of a {style} {noun}",
    "{instruction} the {noun} {preposition} the {place}, {style}, {adjective}",
    "{instruction} a {adjective} {noun} and a {object}",
    "the {noun} of the {noun2} is {adjective}",
    "{function} {noun} {function2} {object}",
    "a {object}",
    "{style} style",
)


def captions(count: int, seed: int = 0) -> Iterator[str]:
    """Yield captions; the same seed gives the same ones.

    Args:
        count: how many.
        seed: of the random choices.
    """
    generator = random.Random(seed)
    pick = generator.choice
    for _ in range(count):
        caption = pick(_TEMPLATES).format(
            adjective=pick(ADJECTIVES),
            color=pick(COLORS),
            color2=pick(COLORS),
            function=pick(FUNCTION_WORDS),
            function2=pick(FUNCTION_WORDS),
            instruction=pick(INSTRUCTIONS),
            noun=pick(NOUNS),
            noun2=pick(NOUNS),
            object=pick(OBJECTS),
            place=pick(PLACES),
            preposition=pick(PREPOSITIONS),
            style=pick(STYLES),
            verb=pick(VERBS),
        )
        if generator.random() < 0.4:
            caption = caption[0].upper() + caption[1:]
        if generator.random() < 0.3:
            caption += "."
        yield caption
