"""Denoising steps of any images together, each at a step of its own.

    latent += (sigma_next - sigma) * velocity

or by a sampler that remembers earlier steps (`uso_engine.sampling.sampler`), each job by its own.
Latents are kept in float32 and in output order; the model sees them rounded to its own dtype. A negative prompt is one more
sequence that reads the same latent: velocity = v_neg + scale * (v_pos - v_neg).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch
from torch import Tensor

from uso_engine.errors import BackendError
from uso_engine.model.packing import PackedBatch
from uso_engine.model.run import Run
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Observer, Transformer
from uso_kernels.euler_update import euler_update, guide_reference
from uso_kernels.ragged import TILE_ROWS, round_up_to_tile

from .job import ImageJob, Job
from .step_graphs import StepGraphs

KEPT_BATCHES = 4
"""Batches whose tables are kept, so that jobs which take turns find theirs again; a few MB each."""


@dataclass(frozen=True)
class Tables:
    """What steps of the same jobs share: the packed sequences, and the rows of each image.

    Args:
        jobs: in order.
        sequences: the jobs' sequences, then those of the negative prompts.
        run: all of them, packed, and what their steps share.
        modulation: [S, vectors, C], which every step fills with its own.
        rows: rows of each job's latent, with padding.
        row_job: int64 [T_pos], the job of each row.
        guided_rows: rows to evaluate again under the negative prompts; None where no image has one.
        negative_rows: int64 [T_pos], each row's negative row, -1 where there is none.
        guidance: float32 [T_pos], each row's scale.
    """

    jobs: tuple[Job, ...]
    sequences: tuple[Sequence, ...]
    run: Run
    modulation: Tensor
    rows: tuple[int, ...]
    row_job: Tensor
    guided_rows: Tensor | None
    negative_rows: Tensor | None
    guidance: Tensor | None

    @property
    def batch(self) -> PackedBatch:
        """All sequences, packed."""
        return self.run.batch

    @property
    def positive_rows(self) -> int:
        """Rows of the images themselves, [T_pos]."""
        return sum(self.rows)


class Denoiser:
    """Takes denoising steps.

    Args:
        transformer: the loaded model.
        graphs: evaluate it by CUDA graphs where they are to; None: never.
    """

    def __init__(self, transformer: Transformer, graphs: StepGraphs | None = None) -> None:
        self._transformer, self._graphs = transformer, graphs
        self._tables: OrderedDict[tuple[int, ...], Tables] = OrderedDict()
        self.batches_formed = 0

    def begin(self, image: ImageJob, *, reference_numerics: bool = False) -> Job:
        """Put an image at its first step.

        Args:
            image: what to denoise.
            reference_numerics: keep the latent in the model's dtype and round every operation to it, as the authors do.

        Raises:
            ValueError: sigmas, negative prompt or latent that do not belong to the sequence.
        """
        return Job.begin(image, self._transformer.img_in.weight, reference_numerics=reference_numerics)

    def tables(self, jobs: Sequences[Job]) -> Tables:
        """The tables of jobs in this order, formed when their step was not among the last ones."""
        key = tuple(map(id, jobs))
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = _form(jobs, self._transformer)
            self.batches_formed += 1
            while len(self._tables) > KEPT_BATCHES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return found

    def forget(self, jobs: Sequences[Job]) -> None:
        """Let go of what is kept of jobs that take no more steps."""
        gone = set(map(id, jobs))
        for key in [key for key in self._tables if not gone.isdisjoint(key)]:
            del self._tables[key]

    @torch.no_grad()
    def step(self, jobs: Sequences[Job], observer: Observer | None = None) -> list[Tensor]:
        """Take the next step of each job; if that fails, all of them are where they were.

        Args:
            jobs: at any step, and all with or all without the authors' numerics.
            observer: sees the transformer's intermediate tensors.

        Returns:
            Each job's velocity [L_img, 64], after true CFG; no later step overwrites it.

        Raises:
            ValueError: no jobs, or some with and some without the authors' numerics.
            RuntimeError: one of them has taken all its steps.
            BackendError: an observer where ``cuda_graphs`` is "on", or a step that cannot be captured there.
        """
        if observer is not None and self._graphs is not None and self._graphs.mode == "on":
            raise BackendError('an observer sees nothing of a captured step; set cuda_graphs to "auto" or "off"')
        for job in jobs:
            if job.index >= job.steps:
                raise RuntimeError(f"all {job.steps} steps are taken")
        tables = self.tables(jobs)
        if len({job.rounds_each_operation for job in jobs}) > 1:
            raise ValueError("jobs with and without reference_numerics cannot take a step together")
        latents = torch.cat([job.latent for job in jobs])
        try:
            velocity = self._velocity(tables, latents, observer)
        except torch.OutOfMemoryError:
            if self._graphs is not None:
                self._graphs.release()
            raise
        delta = torch.stack([job.deltas[job.index] for job in jobs]).index_select(0, tables.row_job)
        if jobs[0].rounds_each_operation:
            if tables.negative_rows is not None:
                velocity = guide_reference(velocity, tables.positive_rows, tables.negative_rows, tables.guidance)
            latents += (velocity * delta[:, None]).to(latents.dtype)
        else:
            velocity = euler_update(latents, velocity, delta, tables.negative_rows, tables.guidance)
        images = velocity[: len(latents)].split(tables.rows)
        _proceed(jobs, latents.split(tables.rows), images)
        return [rows[: job.image.sequence.image_length] for job, rows in zip(jobs, images, strict=True)]

    def _velocity(self, tables: Tables, latents: Tensor, observer: Observer | None) -> Tensor:
        """Velocity of all sequences [T_out, 64]: the images' rows, then those of their negative prompts."""
        latents = latents.to(self._transformer.img_in.weight.dtype)
        if tables.guided_rows is not None:
            latents = torch.cat((latents, latents.index_select(0, tables.guided_rows)))
        index = [job.index for job in tables.jobs]
        index += [job.index for job in tables.jobs if job.image.negative is not None]
        steps = [entry.modulation[i] for entry, i in zip(tables.sequences, index, strict=True)]
        torch.stack(steps, out=tables.modulation)
        if self._graphs is not None and observer is None:
            return self._graphs.evaluate(tables.run, latents, tables.modulation)
        velocity: Tensor = self._transformer(tables.run, latents, tables.modulation, observer)
        return velocity


def _proceed(jobs: Sequences[Job], latents: Sequences[Tensor], velocities: Sequences[Tensor]) -> None:
    """Put every job at its next step: at Euler's latent, or where its own sampler leads from the latent that it still has."""
    reached = [
        (latent, None) if job.multistep is None else job.multistep.advance(job.index, job.latent, velocity)
        for job, latent, velocity in zip(jobs, latents, velocities, strict=True)
    ]
    for job, (latent, multistep) in zip(jobs, reached, strict=True):
        job.latent, job.multistep, job.index = latent, multistep, job.index + 1


def _form(jobs: Sequences[Job], transformer: Transformer) -> Tables:
    if not jobs:
        raise ValueError("nothing to denoise: expected at least one image, got none")
    negatives = [job.image.negative for job in jobs if job.image.negative is not None]
    sequences = (*(job.image.sequence for job in jobs), *negatives)
    rows = tuple(round_up_to_tile(job.image.sequence.image_length) for job in jobs)
    device = jobs[0].latent.device
    counts = torch.tensor([count // TILE_ROWS for count in rows])
    row_job = torch.arange(len(jobs)).repeat_interleave(counts).repeat_interleave(TILE_ROWS)
    guided = _guided_tables(jobs, rows, device) if negatives else (None, None, None)
    run = transformer.run_of(PackedBatch.form(sequences))
    table = sequences[0].modulation
    modulation = table.new_empty(len(sequences), *table.shape[1:])
    return Tables(tuple(jobs), sequences, run, modulation, rows, row_job.to(device), *guided)


def _guided_tables(jobs: Sequences[Job], rows: Sequences[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What true CFG needs: the rows to evaluate again under the negative prompts; each row's negative row, -1 where there is
    none; each row's scale.
    """
    total = sum(rows)
    guided, negative, scales = [], torch.full((total,), -1), torch.ones(total, dtype=torch.float32)
    start, following = 0, total
    for job, count in zip(jobs, rows, strict=True):
        if job.image.negative is not None:
            span = slice(start, start + count)
            guided.append(torch.arange(span.start, span.stop))
            negative[span] = torch.arange(following, following + count)
            scales[span] = job.image.true_cfg_scale
            following += count
        start += count
    return torch.cat(guided).to(device), negative.to(device), scales.to(device)
