"""The tables of a configuration that say how noise becomes a latent: `[sampling]`, and the named points of `[quality]`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .sampling.sampler import LARGEST_SHIFT, SamplerName
from .section import Section

QualityName = Literal["reference", "high", "fast", "draft"]
"""What `quality` may be; "reference" is the configuration as it stands."""


TextPadding = Literal["keep", "merge"]
"""What becomes of a prompt's padding: every row is computed, or nearly equal ones are one."""


class SamplingConfig(Section):
    """How a request that does not say gets from noise to its latent: sampler, a schedule instead of the family's, text rows."""

    sampler: SamplerName = "euler"
    shift: float | None = Field(None, gt=0, le=LARGEST_SHIFT)
    cosine: float = Field(0.0, ge=0, le=1, description="share of cosine spacing in a shift's schedule")
    text_padding: TextPadding = "keep"

    @model_validator(mode="after")
    def _spaced(self) -> Self:
        if self.cosine and self.shift is None:
            raise ValueError(f"cosine = {self.cosine:g} spaces the steps of a shift's schedule; give a shift with it")
        return self


class QualityPoint(SamplingConfig):
    """One point on the measured frontier of a model: what stands for its name."""

    steps: int = Field(ge=1, le=50)


class QualityConfig(Section):
    """The points of a configuration beside "reference", which has none; those that were not measured are absent."""

    high: QualityPoint | None = None
    fast: QualityPoint | None = None
    draft: QualityPoint | None = None

    @property
    def named(self) -> dict[str, QualityPoint]:
        """The points that are there, from the best to the fastest."""
        points = {"high": self.high, "fast": self.fast, "draft": self.draft}
        return {name: point for name, point in points.items() if point is not None}
