"""One denoising step of a request's images, as `on_step` sees it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uso_engine.model.rope import Grid

from .job import Job
from .latents import unpack_latent


@dataclass
class Step:
    """What `on_step` sees after each step; it may change latents, or stop, and keep whatever it is given.

    Args:
        index: of the step just taken, from 0.
        steps: how many there are.
        sigmas: sigma before this step, one per image.
        next_sigmas: sigma after it, one per image.
        latents: each image's packed latent [L_img, 64] after the step, float32. The run goes on from what stands here when
            `on_step` returns, whether it was written to or another tensor was put in its place; later steps do not change it.
        velocities: each image's velocity [L_img, 64], after true CFG; no later step overwrites them.
        grids: rows and columns of tokens of each image.
    """

    index: int
    steps: int
    sigmas: tuple[float, ...]
    next_sigmas: tuple[float, ...]
    latents: tuple[Tensor, ...]
    velocities: tuple[Tensor, ...]
    grids: tuple[Grid, ...]
    stopped: bool = field(default=False, init=False)

    @staticmethod
    def taken(jobs: Sequences[Job], velocities: Sequences[Tensor]) -> Step:
        """The step that jobs of one request have just taken together; its latents are the running ones."""
        index = jobs[0].index
        return Step(
            index=index - 1,
            steps=jobs[0].steps,
            sigmas=tuple(job.image.sigmas[index - 1] for job in jobs),
            next_sigmas=tuple(job.image.sigmas[index] for job in jobs),
            latents=tuple(job.tokens for job in jobs),
            velocities=tuple(velocities),
            grids=tuple(job.image.sequence.grid for job in jobs),
        )

    def stop(self) -> None:
        """End the run after this step; the latents as they are now are the result."""
        self.stopped = True

    def unpacked(self, image: int) -> Tensor:
        """Latent of one image as [16, h / 8, w / 8], a copy."""
        return unpack_latent(self.latents[image], self.grids[image])

    def estimated_clean(self, image: int) -> Tensor:
        """Where the current velocity leads at sigma 0, [16, h / 8, w / 8]: what to preview."""
        tokens = self.latents[image] - self.next_sigmas[image] * self.velocities[image]
        return unpack_latent(tokens, self.grids[image])


OnStep = Callable[[Step], None]


def show(step: Step, on_step: OnStep) -> None:
    """Call `on_step` with latents of its own and go on from what it leaves: a caller may keep or replace what it is given.

    Raises:
        ValueError: something else than tensors of the latents' shapes was left.
    """
    running = step.latents
    # A caller may keep them: what is taken over is written to the running ones.
    step.latents = tuple(latent.clone() for latent in running)
    on_step(step)
    _take_over(step.latents, running)


@torch.no_grad()
def _take_over(latents: object, running: Sequences[Tensor]) -> None:
    """Go on from what was left in `Step.latents`; copying without a comparison costs less than asking the device."""
    expected = [tuple(latent.shape) for latent in running]
    left = latents if isinstance(latents, (list, tuple)) else [latents]
    found = [tuple(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__ for latent in left]
    if found != expected:
        raise ValueError(f"on_step must leave tensors of shapes {expected} in step.latents, got {found}")
    for target, latent in zip(running, left, strict=True):
        target.copy_(latent)
