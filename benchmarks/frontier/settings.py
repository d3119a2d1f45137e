"""The settings on the frontier: every one is a way to the same pictures, with less work than the reference or more."""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.sampling.family import Family
from uso_engine.sampling.sampler import SamplerName
from uso_engine.sampling.schedule import shifted_schedule
from uso_engine.sampling_settings import TextPadding


@dataclass(frozen=True)
class Setting:
    """One way from noise to a latent.

    Args:
        steps: denoising steps.
        sampler: what makes a step of the velocity.
        shift: of the schedule; None for the model's.
        cosine: the share of cosine spacing in a shift's schedule.
        text_padding: what becomes of the prompt's padding.
    """

    steps: int
    sampler: SamplerName = "euler"
    shift: float | None = None
    cosine: float = 0.0
    text_padding: TextPadding = "keep"

    @property
    def name(self) -> str:
        """What the record calls it."""
        return f"{self.sampler} {self.steps}{self._schedule(' ')}{self._merged(' ')}"

    @property
    def option(self) -> str:
        """What it turns beside the number of steps: the curve on which it lies."""
        return self.sampler + self._schedule(", ") + self._merged(", ")

    def _merged(self, before: str) -> str:
        return f"{before}merged padding" if self.text_padding == "merge" else ""

    def _schedule(self, before: str) -> str:
        if self.shift is None:
            return ""
        return f"{before}shift {self.shift:g}" + (f"{before}cosine {self.cosine:g}" if self.cosine else "")

    def sigmas(self, width: int, height: int, family: Family) -> tuple[float, ...]:
        """The schedule for an image."""
        if self.shift is None:
            return tuple(family.sigmas(self.steps, width, height))
        return tuple(shifted_schedule(self.steps, self.shift, self.cosine))


REFERENCE = Setting(28)
EXACT = Setting(56, "ab2")
"""The flow itself, as nearly as counts: Adams-Bashforth's error falls with the square of the steps."""

FEWER_STEPS = (24, 20, 16, 12, 8, 6, 4)
"""Plain fewer steps, which an option has to beat."""

SETTINGS = (
    *(Setting(steps) for steps in FEWER_STEPS),
    *(Setting(steps, "ab2") for steps in (16, 12, 8, 6)),
    *(Setting(steps, "unipc") for steps in (12, 8, 6)),
    *(Setting(steps, "ab2", 1.0) for steps in (12, 8, 6)),
    *(Setting(steps, "ab2", 1.0, 0.25) for steps in (12, 8, 6, 5, 4)),
    Setting(28, text_padding="merge"),
    *(Setting(steps, "ab2", 1.0, 0.25, "merge") for steps in (12, 8)),
)
