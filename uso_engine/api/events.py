"""What happens to a request, as `AsyncUSOEngine.stream` tells it: queued, conditioning, each step, decoding, done.

A request that fails, is cancelled or runs out of time raises instead of ending in `Done`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from .result import GenerationResult


@dataclass(frozen=True)
class Queued:
    """The request was accepted.

    Args:
        position: requests that were accepted before it and have not ended.
    """

    position: int


@dataclass(frozen=True)
class Conditioning:
    """Its prompt and pictures are being encoded."""


@dataclass(frozen=True)
class Stepped:
    """A denoising step was taken.

    Args:
        index: of the step, from 0.
        steps: how many there are.
        preview: a small picture of where the first image is heading, if previews were asked for; left out where the next
            step was there before it.
    """

    index: int
    steps: int
    preview: Image | None = None


@dataclass(frozen=True)
class Decoding:
    """All steps are taken; pictures are being decoded and checked."""


@dataclass(frozen=True)
class Done:
    """The request is done.

    Args:
        result: its images.
    """

    result: GenerationResult


Event = Queued | Conditioning | Stepped | Decoding | Done
