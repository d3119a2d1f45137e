"""The denoising loop on a packed batch.

    latent += (sigma_next - sigma) * velocity

Latents are kept in float32 and in output order for the whole run; the model sees them rounded to its own dtype. A negative
prompt is one more sequence that reads the same latent: velocity = v_neg + scale * (v_pos - v_neg).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uso_engine.model.packing import PackedBatch
from uso_engine.model.rope import Grid
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Observer, Transformer
from uso_kernels.ragged import TILE_ROWS, round_up_to_tile

from .latents import pack_latent, unpack_latent


@dataclass(frozen=True)
class ImageJob:
    """One image to denoise.

    Args:
        sequence: its fixed part.
        latent: [16, h / 8, w / 8], where it starts, usually noise.
        sigmas: steps + 1 falling numbers; the sequence's modulation table was made for them.
        negative: the fixed part of the same image under the negative prompt, if there is one.
        true_cfg_scale: how far to go from the negative prompt's velocity towards the prompt's.
    """

    sequence: Sequence
    latent: Tensor
    sigmas: tuple[float, ...]
    negative: Sequence | None = None
    true_cfg_scale: float = 1.0


@dataclass
class Step:
    """What `on_step` sees after each step; it may change latents in place, or stop.

    Args:
        index: of the step just taken, from 0.
        steps: how many there are.
        sigmas: sigma before this step, one per image.
        next_sigmas: sigma after it, one per image.
        latents: each image's packed latent [L_img, 64] after the step, float32, a view: writing to it changes the run.
        velocities: each image's velocity [L_img, 64], after true CFG.
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


class Denoiser:
    """A packed batch of images on their way from noise to latent.

    Args:
        transformer: the loaded model.
        jobs: the images, all with the same number of steps; sizes, sigmas and scales may differ.
        reference_numerics: keep latents in the model's dtype and round every operation to it, as the authors do.

    Raises:
        ValueError: no jobs, different numbers of steps, or a latent that does not fit its grid.
    """

    def __init__(self, transformer: Transformer, jobs: Sequences[ImageJob], *, reference_numerics: bool = False) -> None:
        _check_jobs(jobs)
        self._transformer = transformer
        self._jobs = tuple(jobs)
        self._guided = [i for i, job in enumerate(jobs) if job.negative is not None]
        negatives = [job.negative for job in jobs if job.negative is not None]
        self._sequences = [*(job.sequence for job in jobs), *negatives]
        self._batch = PackedBatch.form(self._sequences)
        weight = transformer.img_in.weight
        self._model_dtype = weight.dtype
        self._rounds_each_operation = reference_numerics
        layout, rows = self._batch.output, self._positive_rows
        self._latents = torch.zeros(rows, transformer.params.in_channels, dtype=torch.float32)
        for i, job in enumerate(jobs):
            self._latents[layout.span(i)] = pack_latent(job.latent.to("cpu", torch.float32))
        self._latents = self._latents.to(weight.device, self._model_dtype if reference_numerics else torch.float32)
        sigmas = torch.tensor([job.sigmas for job in jobs], dtype=torch.float64)
        row_job = layout.tile_sequence[: rows // TILE_ROWS].cpu().repeat_interleave(TILE_ROWS)
        # [steps, T_pos, 1]: the step width of each row, so that images may have schedules of their own.
        self._deltas = sigmas.diff(dim=1).t()[:, row_job, None].float().contiguous().to(weight.device)
        self._guided_rows, self._guided_scale = self._guided_tables()
        self.index = 0

    @property
    def steps(self) -> int:
        """Denoising steps of this run."""
        return len(self._jobs[0].sigmas) - 1

    @property
    def batch(self) -> PackedBatch:
        """The packed batch, for whoever reads observed tensors."""
        return self._batch

    @property
    def tokens_per_step(self) -> int:
        """Transformer tokens of one step, padding not counted."""
        return sum(sequence.length for sequence in self._sequences)

    @property
    def _positive_rows(self) -> int:
        starts = self._batch.output.starts
        return starts[len(self._jobs)] if len(starts) > len(self._jobs) else self._batch.output.rows

    def _guided_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows of the images under true CFG, in the order of their negative sequences, and the scale of each row."""
        if not self._guided:
            return None, None
        layout, device = self._batch.output, self._latents.device
        rows, scales = [], []
        for i in self._guided:
            size = round_up_to_tile(layout.lengths[i])
            rows.append(torch.arange(layout.starts[i], layout.starts[i] + size))
            scales.append(torch.full((size, 1), self._jobs[i].true_cfg_scale))
        return torch.cat(rows).to(device), torch.cat(scales).to(device)

    @torch.no_grad()
    def step(self, observer: Observer | None = None) -> Step:
        """Take one step.

        Args:
            observer: sees the transformer's intermediate tensors.

        Returns:
            What happened.

        Raises:
            RuntimeError: all steps are taken.
        """
        if self.index >= self.steps:
            raise RuntimeError(f"all {self.steps} steps are taken")
        velocity = self._velocity(observer)
        delta = self._deltas[self.index]
        if self._rounds_each_operation:
            self._latents += (velocity * delta).to(self._latents.dtype)
        else:
            self._latents.addcmul_(velocity.float(), delta)
        self.index += 1
        return self._report(velocity)

    def run(self, on_step: OnStep | None = None, observer: Observer | None = None) -> None:
        """Take all steps; `observer` sees the first one only."""
        while self.index < self.steps:
            report = self.step(observer if self.index == 0 else None)
            if on_step is not None:
                on_step(report)
                if report.stopped:
                    return

    def latents(self) -> list[Tensor]:
        """Each image's latent, [16, h / 8, w / 8] in float32, on the model's device."""
        layout = self._batch.output
        return [unpack_latent(self._latents[layout.span(i)].float(), job.sequence.grid) for i, job in enumerate(self._jobs)]

    def _velocity(self, observer: Observer | None) -> Tensor:
        """Velocity of the images [T_pos, 64], true CFG applied."""
        latents = self._latents.to(self._model_dtype)
        if self._guided_rows is not None:
            latents = torch.cat((latents, latents.index_select(0, self._guided_rows)))
        rows = [sequence.modulation[self.index] for sequence in self._sequences]
        modulation = rows[0][None] if len(rows) == 1 else torch.stack(rows)
        velocity = self._transformer(self._batch, latents, modulation, observer)
        if self._guided_rows is None or self._guided_scale is None:
            return velocity
        positive, negative = velocity.float().split((self._positive_rows, len(self._guided_rows)))
        guided = torch.lerp(negative, positive.index_select(0, self._guided_rows), self._guided_scale)
        return positive.index_copy(0, self._guided_rows, guided)

    def _report(self, velocity: Tensor) -> Step:
        layout = self._batch.output
        spans = [layout.span(i) for i in range(len(self._jobs))]
        return Step(
            index=self.index - 1,
            steps=self.steps,
            sigmas=tuple(job.sigmas[self.index - 1] for job in self._jobs),
            next_sigmas=tuple(job.sigmas[self.index] for job in self._jobs),
            latents=tuple(self._latents[span] for span in spans),
            velocities=tuple(velocity[span] for span in spans),
            grids=tuple(job.sequence.grid for job in self._jobs),
        )


def _check_jobs(jobs: Sequences[ImageJob]) -> None:
    if not jobs:
        raise ValueError("nothing to denoise: expected at least one image, got none")
    steps = {len(job.sigmas) - 1 for job in jobs}
    if len(steps) != 1:
        raise ValueError(f"all images of a batch take the same number of steps, got {sorted(steps)}")
    for i, job in enumerate(jobs):
        count = len(job.sigmas) - 1
        for name, sequence in (("sequence", job.sequence), ("negative", job.negative)):
            if sequence is None:
                continue
            if sequence.grid != job.sequence.grid:
                raise ValueError(f"image {i}: the negative sequence has grid {sequence.grid}, expected {job.sequence.grid}")
            if sequence.modulation.shape[0] != count:
                raise ValueError(f"image {i}: {name} has modulation for {sequence.modulation.shape[0]} steps, expected {count}")
        rows, columns = job.sequence.grid
        if job.latent.shape[-2:] != (2 * rows, 2 * columns):
            raise ValueError(f"image {i}: latent must be {2 * rows}x{2 * columns}, got {tuple(job.latent.shape)}")
