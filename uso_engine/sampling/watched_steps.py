"""Notices whether a caller changes latents between steps, which no setting of a run would tell."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .step import OnStep, Step


@dataclass
class WatchedSteps:
    """Calls a caller's `on_step` and remembers whether it changed latents.

    Args:
        on_step: the caller's.
    """

    on_step: OnStep
    _changed: Tensor | None = field(default=None, init=False)

    def __call__(self, step: Step) -> None:
        before = [latent.clone() for latent in step.latents]
        self.on_step(step)
        left: object = step.latents  # Whatever a caller put there; the denoiser refuses what is none.
        for old, new in zip(before, left if isinstance(left, (list, tuple)) else (), strict=False):
            comparable = isinstance(new, Tensor) and old.shape == new.shape
            # Kept on the device: asking now would make every step wait for it.
            differs = (old != new).any() if comparable else torch.tensor(True)
            self._changed = differs if self._changed is None else self._changed.to(differs.device) | differs

    @property
    def changed(self) -> bool:
        """Whether any step's latents were changed."""
        return self._changed is not None and bool(self._changed)
