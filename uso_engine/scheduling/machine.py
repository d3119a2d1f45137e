"""The model as the loop uses it: jobs begin, take steps together, and are forgotten; LoRAs change in between."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor

from uso_engine.generation import Generation
from uso_engine.loading.lora_choice import ChosenLoRAs
from uso_engine.pipeline import Pipeline
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.graph_statistics import GraphStatistics
from uso_engine.sampling.job import Job
from uso_engine.sampling.step_graphs import StepGraphs

from .active import ActiveRequest


def company_of(generation: Generation) -> Hashable:
    """What requests agree in that share a step: numerics, and lengths where the attention backend takes equal ones only."""
    exact = not generation.options.reference_numerics
    if generation.parts.pipeline.transformer.attention_backend != "dense_batched":
        return exact
    size = generation.size()
    return exact, size.rows // size.sequences


class Machine(Protocol):
    """The model as the loop uses it; `PipelineMachine` is the real one."""

    @property
    def batches_formed(self) -> int:
        """Batches whose tables were made."""

    def graph_statistics(self) -> GraphStatistics:
        """What became of the steps by ``cuda_graphs``."""

    def admit(self, request: ActiveRequest) -> None:
        """Make the jobs of a request that begins, and say which attention backends compute them."""

    def step(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Take the next step of each job, or leave all of them where they were."""

    def forget(self, jobs: Sequence[Job]) -> None:
        """Let go of what is kept of jobs that take no more steps."""

    def change_loras(self, loras: Hashable) -> None:
        """Merge other LoRAs; the weights stay as they were where that fails."""

    def rest(self) -> None:
        """No step follows soon: let go of what only steps need."""


class PipelineMachine:
    """A pipeline's transformer.

    Args:
        pipeline: loaded.
        graphs: of its transformer.
    """

    def __init__(self, pipeline: Pipeline, graphs: StepGraphs) -> None:
        self._pipeline, self._graphs = pipeline, graphs
        self._denoiser = Denoiser(pipeline.transformer, graphs)

    @property
    def batches_formed(self) -> int:
        """Batches whose tables were made."""
        return self._denoiser.batches_formed

    def graph_statistics(self) -> GraphStatistics:
        """What became of the steps by ``cuda_graphs``."""
        return self._graphs.statistics()

    def admit(self, request: ActiveRequest) -> None:
        """Make the jobs of a request that begins, and say which attention backends compute them.

        Raises:
            ValueError: latents or sigmas that do not fit.
            BackendError: the attention backend that was asked for cannot compute its sequences.
        """
        assert isinstance(request.work, Generation)
        numerics = request.work.options.reference_numerics
        jobs = [self._denoiser.begin(image, reference_numerics=numerics) for image in request.work.admit()]
        request.attention = self._pipeline.attention_backends(self._denoiser.tables(jobs).batch)
        request.jobs = jobs

    def step(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Take the next step of each job, or leave all of them where they were."""
        return self._denoiser.step(jobs)

    def forget(self, jobs: Sequence[Job]) -> None:
        """Let go of what is kept of jobs that take no more steps."""
        self._denoiser.forget(jobs)

    def change_loras(self, loras: Hashable) -> None:
        """Merge other LoRAs; the weights stay as they were where that fails.

        Raises:
            LoRAError: they do not fit.
        """
        assert isinstance(loras, ChosenLoRAs)
        self._pipeline.set_loras(loras.loras, keep_configured=loras.keep_configured)

    def rest(self) -> None:
        """No step follows soon: let go of the buffers through which layers are streamed."""
        if self._pipeline.placement is not None:
            self._pipeline.placement.end_denoising()
