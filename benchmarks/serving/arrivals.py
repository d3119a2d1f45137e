"""Requests of several sizes that arrive at random moments, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

PROMPTS = ("a red fish", "a small house at night", "a green cup", "a tree", "a boat on the sea", "a bird")


@dataclass(frozen=True)
class Size:
    """A kind of request.

    Args:
        name: of it.
        side: of its square image in pixels.
        steps: of its run.
        references: how many images it has, the first for content.
        share: of all requests.
    """

    name: str
    side: int
    steps: int
    references: int
    share: float


SIZES = (Size("small", 128, 8, 0, 0.5), Size("medium", 256, 12, 1, 0.35), Size("large", 512, 16, 2, 0.15))


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes."""

    at_s: float
    size: Size
    seed: int

    def fields(self) -> dict[str, Any]:
        """Of the request."""
        pictures = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB")]
        return {
            "prompt": PROMPTS[self.seed % len(PROMPTS)],
            "images": pictures[: self.size.references],
            "image_size": {"width": self.size.side, "height": self.size.side},
            "num_inference_steps": self.size.steps,
            "seed": self.seed,
        }


def arrivals(count: int, per_s: float, seed: int, *, burst: int = 1) -> list[Arrival]:
    """A trace.

    Args:
        count: of requests.
        per_s: mean of them in a second.
        seed: of moments and sizes.
        burst: requests that come at once; 1 is a Poisson process.
    """
    drawn, now_s, found = random.Random(seed), 0.0, list[Arrival]()
    for number in range(count):
        if number % burst == 0:
            now_s += drawn.expovariate(per_s / burst)
        (size,) = drawn.choices(SIZES, [size.share for size in SIZES])
        found.append(Arrival(now_s, size, number + 1))
    return found
