"""What the first process tells the others, besides steps."""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.weights.lora import LoRASet

from .step import StepMessage


@dataclass(frozen=True)
class LoRAMessage:
    """Merge these LoRAs, as the first process has done.

    Args:
        loras: with their strengths.
        keep_configured: whether the configuration's stay.
    """

    loras: LoRASet
    keep_configured: bool


@dataclass(frozen=True)
class End:
    """Nothing follows."""


Message = StepMessage | LoRAMessage | End
