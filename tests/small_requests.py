"""Requests whose images are those of a small transformer, and a loop without threads that a test turns by hand."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from random_models import SMALL, drawn_conditions, small_transformer
from torch import Tensor

from uso_engine.api.events import Done
from uso_engine.errors import USOError
from uso_engine.model.keys import Merged
from uso_engine.model.rope import Grid
from uso_engine.model.transformer import Transformer
from uso_engine.queue_limits import QueueLimits
from uso_engine.sampling.admission import admit
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.graph_statistics import GraphStatistics
from uso_engine.sampling.job import ImageJob, Job
from uso_engine.sampling.latents import draw_noise
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.step import Step, show
from uso_engine.scheduling.active import ActiveRequest
from uso_engine.scheduling.counters import Counters
from uso_engine.scheduling.handle import Failed, Message, RequestHandle, StepTaken
from uso_engine.scheduling.loop import RequestLoop
from uso_engine.scheduling.queue import RequestQueue
from uso_engine.scheduling.scheduler import Scheduler
from uso_engine.stopwatch import Stopwatch

CPU = torch.device("cpu")
# Grid, text tokens, style tokens, content latents, and text rows that stand for several; aligned and padded.
SHAPES: list[tuple[Grid, int, int, tuple[Grid, ...], Merged]] = [
    ((4, 4), 32, 0, (), ()),
    ((3, 5), 21, 24, ((6, 10),), ()),
    ((1, 3), 5, 0, ((2, 2), (4, 6)), ()),
    ((8, 6), 40, 3, (), ()),
    ((2, 5), 7, 4, ((4, 4),), ((4, 9), (6, 2))),
]


def image_jobs(transformer: Transformer, shape: int, steps: int, images: int = 1, *, negative: bool = False) -> list[ImageJob]:
    """The images of a request of one of `SHAPES`."""
    grid, text, style, contents, merged = SHAPES[shape]
    sigmas = tuple(1 - i / steps for i in range(steps + 1))
    sequences = []
    for seed in (shape, 100 + shape) if negative else (shape,):
        conditions = drawn_conditions(SMALL, seed=seed, text=text, style=style, contents=contents)
        sequences.append(admit(transformer, replace(conditions, merged=merged), grid, sigmas, 4.0))
    return [
        ImageJob(sequences[0], draw_noise(16 * grid[1], 16 * grid[0], 7 + i), sigmas, sequences[1] if negative else None, 2.0)
        for i in range(images)
    ]


@dataclass
class SmallWork:
    """Stages of a request; the result is its latents.

    Args:
        images: what it makes.
        fault: the stage that fails.
        size_bytes: that it holds.
        told: the stages that were done.
    """

    images: list[ImageJob]
    fault: str | None = None
    size_bytes: int = 0
    told: list[str] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=lambda: Stopwatch(CPU))

    @property
    def steps(self) -> int:
        return len(self.images[0].sigmas) - 1

    @property
    def tokens(self) -> int:
        return sum(image.tokens for image in self.images)

    def _stage(self, name: str) -> None:
        self.told.append(name)
        if self.fault == name:
            raise ValueError(f"{name} fails")

    def encode(self) -> None:
        self._stage("encode")

    def admit(self) -> list[ImageJob]:
        self._stage("admit")
        return self.images

    def finish(self, jobs: Sequence[Job], attention: tuple[str, ...]) -> Any:
        self._stage("finish")
        return [job.unpacked() for job in jobs]

    def preview(self, step: Step) -> Any:
        self._stage("preview")
        return step.estimated_clean(0)

    def release(self) -> None:
        self.told.append("release")


class SmallMachine:
    """A denoiser; a step of more tokens than there is memory for fails, and so does one after the fault is set.

    Steps wait where a test clears `may_step`.
    """

    def __init__(self, transformer: Transformer) -> None:
        self.denoiser = Denoiser(transformer)
        self.memory_tokens = 10**9
        self.fault: BaseException | None = None
        self.may_step = threading.Event()
        self.may_step.set()
        self.companies: list[int] = []
        self.loras: list[Hashable] = []
        self.refused_loras: Hashable = None

    @property
    def batches_formed(self) -> int:
        return self.denoiser.batches_formed

    def graph_statistics(self) -> GraphStatistics:
        return GraphStatistics("off", "this machine has none")

    def admit(self, request: ActiveRequest) -> None:
        assert request.work is not None
        request.jobs = [self.denoiser.begin(image) for image in request.work.admit()]

    def step(self, jobs: Sequence[Job]) -> list[Tensor]:
        assert self.may_step.wait(60)
        if self.fault is not None:
            raise self.fault
        if sum(job.image.tokens for job in jobs) > self.memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.companies.append(len(jobs))
        return self.denoiser.step(jobs)

    def forget(self, jobs: Sequence[Job]) -> None:
        self.denoiser.forget(jobs)

    def change_loras(self, loras: Hashable) -> None:
        if loras == self.refused_loras:
            raise ValueError("these LoRAs do not fit")
        self.loras.append(loras)

    def rest(self) -> None:
        pass


class FakeClock:
    """A clock that stands still until somebody moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class HandTurnedLoop:
    """A loop whose rounds a test takes."""

    def __init__(self, transformer: Transformer | None = None, *, loras: Hashable = None, **limits: Any) -> None:
        self.transformer = transformer if transformer is not None else small_transformer()
        self.machine, self.clock = SmallMachine(self.transformer), FakeClock()
        bounds = QueueLimits(**limits)
        scheduler = Scheduler(bounds.max_step_tokens, bounds.lora_patience_s, loras=loras)
        self.queue = RequestQueue("small", bounds, scheduler, Counters(), self.clock)
        self.loop = RequestLoop(self.queue, self.machine, CPU, threaded=False)

    def submit(self, work: SmallWork, *, priority: int = 0, timeout_s: float | None = None, **handle: Any) -> Submitted:
        """Put a request in line."""
        own = RequestHandle(**handle)
        request = self.queue.accept(own, priority=priority, timeout_s=timeout_s)
        try:
            self.queue.enqueue(request, work, tokens=work.tokens, loras=getattr(work, "loras", None))
        except USOError as error:
            self.queue.end(request, Failed(error))
            raise
        self.loop.submit(request)
        return Submitted(own, work, request)

    def turn(self, rounds: int = 1) -> None:
        """Take rounds; fewer where there is nothing to do."""
        for _ in range(rounds):
            if not self.loop.round():
                return

    def run(self) -> None:
        """Take rounds until there is nothing to do."""
        while self.loop.round():
            pass


@dataclass
class Submitted:
    """A request that was put in line."""

    handle: RequestHandle
    work: SmallWork
    request: ActiveRequest
    messages: list[Message] = field(default_factory=list)

    def read(self) -> list[Message]:
        """Every message so far."""
        queued = self.handle._messages
        while not queued.empty():
            self.messages.append(self.handle.next())
        return self.messages

    @property
    def latents(self) -> list[Tensor]:
        """What came out."""
        last = self.read()[-1]
        assert isinstance(last, Done), last
        return cast("list[Tensor]", last.result)

    @property
    def error(self) -> BaseException:
        """How it failed."""
        last = self.read()[-1]
        assert isinstance(last, Failed), last
        return last.error

    def look(self, on_step: Any) -> bool:
        """Show `on_step` the step that waits to be looked at, if there is one."""
        messages = self.read()
        if not messages or not isinstance(messages[-1], StepTaken) or not self.handle.looking:
            return False
        show(messages[-1].step, on_step)
        self.handle.resume(stopped=messages[-1].step.stopped)
        return True


def alone(transformer: Transformer, work: SmallWork) -> list[Tensor]:
    """The latents of a request by itself."""
    run = DenoisingRun(transformer, work.images)
    run.run()
    return run.latents()
