"""What makes a model of the FLUX transformer: where its content images stand, its sigmas, and how large its references are.

USO and UNO have the same transformer and differ in their LoRA, in USO's style projector, and in the rules here. A configuration
chooses them by name (``family`` under ``[transformer]``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from uso_engine.model.params import FamilyName
from uso_engine.model.rope import Grid, PositionOffset, content_positions

from .schedule import check_sigmas, schedule


class ContentPositions(Protocol):
    """Position ids of content images; arguments as of `uso_engine.model.rope.content_positions`."""

    def __call__(
        self, target: Grid, contents: Sequence[Grid], mode: PositionOffset = "d", *, axes: int = 3
    ) -> list[Tensor]: ...


@dataclass(frozen=True)
class Family:
    """The rules that a model was trained with around its transformer.

    Args:
        name: what configurations call it.
        content_positions: position ids of the content images.
        sigmas: of steps, width and height in pixels; steps + 1 falling numbers.
        reference_long_side: the long side in pixels of each reference, of how many there are and of what one alone has.
        position_offset: the mode of `content_positions` that the model was trained with.
    """

    name: FamilyName
    content_positions: ContentPositions
    sigmas: Callable[[int, int, int], list[float]]
    reference_long_side: Callable[[int, int], int]
    position_offset: PositionOffset = "d"

    def counted_sigmas(self, steps: int, width: int, height: int) -> list[float]:
        """The sigmas of a run.

        Args:
            steps: denoising steps.
            width: of the image, in pixels.
            height: of the image, in pixels.

        Raises:
            ValueError: the family's are not steps + 1 falling numbers; what runs would not be what was asked for.
        """
        sigmas = check_sigmas(self.sigmas(steps, width, height))
        if len(sigmas) != steps + 1:
            raise ValueError(f"family {self.name} has {len(sigmas)} sigmas for {steps} steps, expected {steps + 1}")
        return sigmas


def always_the_same(references: int, alone: int) -> int:
    """USO's references have one size, however many there are."""
    return alone


def smaller_in_company(references: int, alone: int) -> int:
    """UNO's have 5/8 of it where there are several: 320 pixels instead of 512.

    Source: UNO, ``inference.py`` and ``UNOPipeline.gradio_generate``.
    """
    return alone if references <= 1 else alone * 5 // 8


FAMILIES: dict[FamilyName, Family] = {
    "uso": Family("uso", content_positions, schedule, always_the_same),
    "uno": Family("uno", content_positions, schedule, smaller_in_company),
}
