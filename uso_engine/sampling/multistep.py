"""A sampler on its way through one image's steps: its weights, and the answers of the last steps that it still needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from .sampler import SAMPLERS, SamplerName, Update

KEPT_ANSWERS = 2
"""Answers that a step reads beside the newest."""


@dataclass(frozen=True)
class Multistep:
    """A sampler that remembers; replaced at every step, so that a step which fails leaves it as it was.

    Args:
        sampler: its name.
        sigmas: steps + 1 falling numbers.
        updates: the weights of each step.
        answers: of the model at the last steps, the newest first, float32 [rows, 64] each.
    """

    sampler: SamplerName
    sigmas: tuple[float, ...]
    updates: tuple[Update, ...] = field(repr=False)
    answers: tuple[Tensor, ...] = field(default=(), repr=False)

    @staticmethod
    def begin(sampler: SamplerName, sigmas: Sequence[float]) -> Multistep | None:
        """The sampler before the first step; None for Euler, which remembers nothing.

        Raises:
            ValueError: sigmas that the sampler cannot take.
        """
        updates = SAMPLERS[sampler].updates(sigmas)
        return None if sampler == "euler" else Multistep(sampler, tuple(sigmas), updates)

    def advance(self, index: int, latent: Tensor, velocity: Tensor) -> tuple[Tensor, Multistep]:
        """Take a step; each operation is elementwise on this image alone, so its bits know no company.

        Args:
            index: of the step.
            latent: float32 [rows, 64], as the model saw it.
            velocity: float32 [rows, 64], after true CFG.

        Returns:
            The next latent, a new tensor, and the sampler after the step.
        """
        newest = velocity.clone()  # Its rows may be a view of a whole company's.
        if SAMPLERS[self.sampler].answer == "clean":
            newest.mul_(-self.sigmas[index]).add_(latent)
        answers = (newest, *self.answers[:KEPT_ANSWERS])
        update = self.updates[index]
        following = latent * update.of_latent
        for answer, weight in zip(answers, update.of_answers, strict=False):
            following.add_(answer, alpha=weight)
        return following, replace(self, answers=answers)
