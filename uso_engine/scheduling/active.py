"""A request that an engine has accepted and not yet ended: its ticket, its stages, its jobs, its deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from uso_engine.process_state import ProcessHold
from uso_engine.sampling.job import ImageJob, Job
from uso_engine.sampling.step import Step
from uso_engine.stopwatch import Stopwatch

from .handle import RequestHandle
from .outcome import Answer
from .scheduler import Ticket

if TYPE_CHECKING:
    from PIL.Image import Image

    from uso_engine.api.result import GenerationResult

Stage = Literal["accepted", "waiting for conditioning", "conditioning", "denoising", "waiting for decoding", "decoding"]


class Work(Protocol):
    """The stages of a request; `uso_engine.generation.Generation` is one."""

    watch: Stopwatch

    @property
    def steps(self) -> int:
        """Denoising steps that it takes."""

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds while it waits."""

    def encode(self) -> None:
        """Encode its inputs."""

    def admit(self) -> list[ImageJob]:
        """Compute what no step changes."""

    def finish(self, jobs: Sequence[Job], attention: tuple[str, ...]) -> GenerationResult:
        """Turn its latents into a result."""

    def preview(self, step: Step) -> Image:
        """Where it is heading."""

    def release(self) -> None:
        """Let go of what it holds: whoever keeps an error of it keeps the work itself, by the functions between."""


@dataclass(eq=False)
class ActiveRequest(Ticket):
    """A ticket with everything that belongs to it.

    Args:
        handle: its caller's.
        queue_deadline_s: when it has to have begun.
        deadline_s: when it has to be done.
        threads: of the caller's PyTorch, for the stages whose last bits depend on them.
        hold: keeps the settings of the process as long as anything of it runs.
        work: its stages, once its inputs are opened.
        jobs: its images, once it has begun.
        attention: the backends that compute them.
        stage: where it is.
        last_step: the step whose preview is not made yet.
        number: of the request, for the trace.
        doom: with what it is to end as soon as nobody works on it.
    """

    handle: RequestHandle = field(default_factory=RequestHandle)
    queue_deadline_s: float = float("inf")
    deadline_s: float = float("inf")
    threads: int = field(default_factory=torch.get_num_threads)
    hold: ProcessHold | None = None
    work: Work | None = None
    jobs: list[Job] = field(default_factory=list)
    attention: tuple[str, ...] = ()
    stage: Stage = "accepted"
    last_step: Step | None = None
    number: int = 0
    doom: BaseException | None = None

    def refresh(self) -> None:
        """See whether it may take a step as things stand now."""
        at_rest = not self.handle.looking and not self.handle.stopped and not self.handle.cancelled and self.doom is None
        self.ready = self.stage == "denoising" and at_rest and self.steps_left > 0

    @property
    def is_through(self) -> bool:
        """Whether it takes no more steps, and nobody looks at the last one."""
        denoised = self.steps_left == 0 or self.handle.stopped
        return self.stage == "denoising" and self.begun and denoised and not self.handle.looking

    @property
    def expires_s(self) -> float:
        """When it runs out of time as it stands now."""
        return self.deadline_s if self.begun else min(self.deadline_s, self.queue_deadline_s)


@dataclass(eq=False)
class LoRAChange(Ticket):
    """Other LoRAs for the requests after it, as a request without steps.

    Args:
        done: answered when they are in the weights.
        threads: of the caller's PyTorch.
    """

    done: Answer[None] = field(default_factory=Answer)
    threads: int = field(default_factory=torch.get_num_threads)
