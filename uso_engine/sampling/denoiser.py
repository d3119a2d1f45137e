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
from uso_kernels.euler_update import euler_update, guide_reference
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
    """What `on_step` sees after each step; it may change latents, or stop, and keep whatever it is given.

    What `Denoiser.step` returns is the same without copies: its latents are the running ones, and its velocities lie in memory
    that the next step overwrites.

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
        # [steps, T_pos]: the step width of each row, so that images may have schedules of their own.
        self._deltas = sigmas.diff(dim=1).t()[:, row_job].float().contiguous().to(weight.device)
        self._guided_rows, self._negative_rows, self._guidance = self._guided_tables()
        self.index = 0

    @property
    def steps(self) -> int:
        """Denoising steps of this run."""
        return len(self._jobs[0].sigmas) - 1

    @property
    def batch(self) -> PackedBatch:
        """The packed batch: where each sequence's rows lie in observed tensors."""
        return self._batch

    @property
    def tokens_per_step(self) -> int:
        """Transformer tokens of one step, padding not counted."""
        return sum(sequence.length for sequence in self._sequences)

    @property
    def _positive_rows(self) -> int:
        starts = self._batch.output.starts
        return starts[len(self._jobs)] if len(starts) > len(self._jobs) else self._batch.output.rows

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """The attention backends that compute this batch."""
        return self._transformer.attention_backends(self._batch)

    def _guided_tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What true CFG needs: the rows to evaluate again under the negative prompts; each row's negative row, -1 where there
        is none; each row's scale. All None where no image has a negative prompt.
        """
        if not self._guided:
            return None, None, None
        layout, device, rows = self._batch.output, self._latents.device, self._positive_rows
        guided, negative, scales = [], torch.full((rows,), -1), torch.ones(rows, dtype=torch.float32)
        following = rows
        for i in self._guided:
            span = slice(layout.starts[i], layout.starts[i] + round_up_to_tile(layout.lengths[i]))
            guided.append(torch.arange(span.start, span.stop))
            negative[span] = torch.arange(following, following + span.stop - span.start)
            scales[span] = self._jobs[i].true_cfg_scale
            following += span.stop - span.start
        return torch.cat(guided).to(device), negative.to(device), scales.to(device)

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
            if self._negative_rows is not None:
                velocity = guide_reference(velocity, self._positive_rows, self._negative_rows, self._guidance)
            self._latents += (velocity * delta[:, None]).to(self._latents.dtype)
        else:
            velocity = euler_update(self._latents, velocity, delta, self._negative_rows, self._guidance)
        self.index += 1
        return self._report(velocity)

    def run(self, on_step: OnStep | None = None, observer: Observer | None = None) -> None:
        """Take all steps; `observer` sees the first one only."""
        while self.index < self.steps:
            report = self.step(observer if self.index == 0 else None)
            if on_step is not None:
                running = report.latents
                # A caller may keep them: later steps write to the running ones.
                report.latents = tuple(latent.clone() for latent in running)
                on_step(report)
                _take_over(report.latents, running)
                if report.stopped:
                    return

    def latents(self) -> list[Tensor]:
        """Each image's latent, [16, h / 8, w / 8] in float32, on the model's device."""
        layout = self._batch.output
        return [unpack_latent(self._latents[layout.span(i)].float(), job.sequence.grid) for i, job in enumerate(self._jobs)]

    def _velocity(self, observer: Observer | None) -> Tensor:
        """Velocity of all sequences [T_out, 64]: the images' rows, then those of their negative prompts."""
        latents = self._latents.to(self._model_dtype)
        if self._guided_rows is not None:
            latents = torch.cat((latents, latents.index_select(0, self._guided_rows)))
        modulation = torch.stack([sequence.modulation[self.index] for sequence in self._sequences])
        return self._transformer(self._batch, latents, modulation, observer)

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


@torch.no_grad()
def _take_over(latents: object, running: Sequences[Tensor]) -> None:
    """Go on from what `on_step` left in `Step.latents`; copying without a comparison costs less than asking the device."""
    expected = [tuple(latent.shape) for latent in running]
    left = latents if isinstance(latents, (list, tuple)) else [latents]
    found = [tuple(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__ for latent in left]
    if found != expected:
        raise ValueError(f"on_step must leave tensors of shapes {expected} in step.latents, got {found}")
    for target, latent in zip(running, left, strict=True):
        target.copy_(latent)


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
