"""One image being denoised: what it is, its running latent, and how many steps are taken."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from uso_engine.model.sequence import Sequence
from uso_kernels.ragged import round_up_to_tile

from .latents import pack_latent, unpack_latent
from .multistep import Multistep
from .sampler import SamplerName


@dataclass(frozen=True)
class ImageJob:
    """One image to denoise.

    Args:
        sequence: its fixed part.
        latent: [16, h / 8, w / 8], where it starts, usually noise.
        sigmas: steps + 1 falling numbers; the sequence's modulation table was made for them.
        negative: the fixed part of the same image under the negative prompt, if there is one.
        true_cfg_scale: how far to go from the negative prompt's velocity towards the prompt's.
        sampler: what makes a step of the velocity.
    """

    sequence: Sequence
    latent: Tensor
    sigmas: tuple[float, ...]
    negative: Sequence | None = None
    true_cfg_scale: float = 1.0
    sampler: SamplerName = "euler"

    @property
    def tokens(self) -> int:
        """Transformer tokens of a step, padding not counted."""
        return self.sequence.length + (0 if self.negative is None else self.negative.length)


@dataclass(eq=False)
class Job:
    """An image on its way from noise to latent.

    Args:
        image: what it is.
        latent: [L_img rounded up to a tile, 64], packed, with padding rows; replaced at every step.
        deltas: float32 [steps], the width of each step, on the model's device.
        rounds_each_operation: whether every operation is rounded to the latent's dtype, as the authors do.
        index: of the next step.
        multistep: the sampler where it remembers earlier steps; replaced at every step. None: Euler.
    """

    image: ImageJob
    latent: Tensor = field(repr=False)
    deltas: Tensor = field(repr=False)
    rounds_each_operation: bool = False
    index: int = 0
    multistep: Multistep | None = None

    @staticmethod
    def begin(image: ImageJob, weight: Tensor, *, reference_numerics: bool = False) -> Job:
        """Put an image at its first step.

        Args:
            image: what to denoise.
            weight: of the model, for its device and dtype.
            reference_numerics: keep the latent in the model's dtype and round every operation to it, as the authors do.

        Raises:
            ValueError: sigmas, negative prompt or latent that do not belong to the sequence, or sigmas that the sampler cannot
                take; a sampler that the authors do not have, with their numerics.
        """
        _check(image)
        if reference_numerics and image.sampler != "euler":
            raise ValueError(f"reference_numerics are those of the authors' Euler steps, not of sampler {image.sampler!r}")
        tokens = pack_latent(image.latent.to("cpu", torch.float32))
        latent = tokens.new_zeros(round_up_to_tile(len(tokens)), tokens.shape[1])
        latent[: len(tokens)] = tokens
        deltas = torch.tensor(image.sigmas, dtype=torch.float64).diff().float()
        dtype = weight.dtype if reference_numerics else torch.float32
        multistep = Multistep.begin(image.sampler, image.sigmas)
        return Job(image, latent.to(weight.device, dtype), deltas.to(weight.device), reference_numerics, multistep=multistep)

    @property
    def steps(self) -> int:
        """Denoising steps from the first to the last."""
        return len(self.image.sigmas) - 1

    @property
    def tokens(self) -> Tensor:
        """The running latent [L_img, 64], a view without padding rows."""
        return self.latent[: self.image.sequence.image_length]

    def unpacked(self) -> Tensor:
        """The latent as it is now, [16, h / 8, w / 8] in float32, on the model's device."""
        return unpack_latent(self.tokens.float(), self.image.sequence.grid)


def _check(image: ImageJob) -> None:
    steps, grid = len(image.sigmas) - 1, image.sequence.grid
    for name, sequence in (("sequence", image.sequence), ("negative", image.negative)):
        if sequence is None:
            continue
        if sequence.grid != grid:
            raise ValueError(f"the negative sequence has grid {sequence.grid}, expected {grid}")
        if sequence.modulation.shape[0] != steps:
            raise ValueError(f"{name} has modulation for {sequence.modulation.shape[0]} steps, expected {steps}")
    rows, columns = grid
    if image.latent.shape[-2:] != (2 * rows, 2 * columns):
        raise ValueError(f"latent must be {2 * rows}x{2 * columns}, got {tuple(image.latent.shape)}")
