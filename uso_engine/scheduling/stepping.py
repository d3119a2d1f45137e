"""One step of several requests, in which a request that cannot take it fails alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from uso_engine.errors import BackendError, DeviceMemoryError, ParallelError
from uso_engine.loading.device import let_go
from uso_engine.loading.device import out_of_memory as device_memory_error
from uso_engine.sampling.job import Job
from uso_kernels.attention import BackendUnavailable

from .active import ActiveRequest

_ADVICE = (
    "ask for a smaller size, fewer images or fewer references, or set memory_budget_gib, so that parts of the model wait on "
    "the host"
)


class Stepper(Protocol):
    """What takes steps; `uso_engine.sampling.denoiser.Denoiser` is one."""

    def step(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Take the next step of each job, or leave all of them where they were."""


@dataclass
class StepOutcome:
    """What became of a step.

    Args:
        taken: those who took it, with the velocities of their jobs.
        failed: those who could not, with the reason.
        too_large: tokens of the company for which memory did not do, if it came to that.
    """

    taken: list[tuple[ActiveRequest, list[Tensor]]] = field(default_factory=list)
    failed: list[tuple[ActiveRequest, Exception]] = field(default_factory=list)
    too_large: int | None = None


def take_step(stepper: Stepper, members: Sequence[ActiveRequest]) -> StepOutcome:
    """Take the next step of requests, together if that is possible.

    Where memory does not do, it is tried once more without the newest half; where it does not do again, the newest of the rest
    fails. Whoever was left out takes a later step. Another error is the fault of one of them: each then takes its step alone.

    Args:
        stepper: takes steps.
        members: at least one.

    Raises:
        Exception: of a device that can no longer be used; nobody's fault.
    """
    outcome = StepOutcome()
    try:
        _together(stepper, members, outcome)
    except torch.OutOfMemoryError as error:
        release_memory(error)
        outcome.too_large = sum(member.tokens for member in members)
        _retry_smaller(stepper, sorted(members, key=lambda member: member.arrival_s), outcome)
    except Exception as error:  # noqa: BLE001 - of any type: it is handed to the request whose fault it is
        _find_whose(stepper, members, error, outcome)
    return outcome


def _together(stepper: Stepper, members: Sequence[ActiveRequest], outcome: StepOutcome) -> None:
    velocities = iter(stepper.step([job for member in members for job in member.jobs]))
    outcome.taken += [(member, [next(velocities) for _ in member.jobs]) for member in members]


def _retry_smaller(stepper: Stepper, oldest_first: Sequence[ActiveRequest], outcome: StepOutcome) -> None:
    fewer = oldest_first[: (len(oldest_first) + 1) // 2]
    try:
        _together(stepper, fewer, outcome)
    except torch.OutOfMemoryError as error:
        release_memory(error)
        _fail(fewer[-1], error, outcome)
    except Exception as error:  # noqa: BLE001 - likewise
        _find_whose(stepper, fewer, error, outcome)


def _find_whose(stepper: Stepper, members: Sequence[ActiveRequest], error: Exception, outcome: StepOutcome) -> None:
    """Let each take its step alone, so that an error of their step together is one's own."""
    let_go(error)
    if len(members) == 1 or _is_fatal(error):
        _fail(members[0], error, outcome)
        return
    for member in members:
        alone = take_step(stepper, [member])
        outcome.taken += alone.taken
        outcome.failed += alone.failed


def _fail(member: ActiveRequest, error: Exception, outcome: StepOutcome) -> None:
    if _is_fatal(error):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        outcome.failed.append((member, out_of_memory(error, "a denoising step")))
    elif isinstance(error, BackendUnavailable):
        outcome.failed.append((member, BackendError(str(error))))
    else:
        outcome.failed.append((member, error))


def out_of_memory(error: BaseException, where: str) -> DeviceMemoryError:
    """What a caller gets for memory that did not do."""
    device = torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")
    return device_memory_error(error, where, device, _ADVICE)


def release_memory(error: BaseException) -> None:
    """Free what a step held when it ran out of memory, and give back what PyTorch's allocator keeps, which may be in pieces."""
    let_go(error)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_fatal(error: Exception) -> bool:
    """Whether no later step can succeed: the device is lost, as after an illegal memory access, or another process is."""
    lost = isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
    return lost or isinstance(error, ParallelError)
