"""A step for which memory does not do."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from uso_engine.errors import DeviceMemoryError, ParallelError
from uso_engine.loading.device import out_of_memory
from uso_engine.scheduling.stepping import take_step


class Short:
    """Takes steps of so many jobs; a larger one runs out of memory with its activations in its hands."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        self.most, self.error = most, error
        self.alive_before: list[int] = []
        self.activations: list[weakref.ref[Tensor]] = []

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self.activations)

    @torch.no_grad()
    def step(self, jobs: Sequence[object]) -> list[Tensor]:
        self.alive_before.append(self.alive)
        activations = torch.zeros(len(jobs))
        self.activations.append(weakref.ref(activations))
        return self._velocities(activations)

    def _velocities(self, activations: Tensor) -> list[Tensor]:
        scores = activations + 1
        self.activations.append(weakref.ref(scores))
        if len(activations) > self.most:
            raise self.error or torch.OutOfMemoryError("CUDA out of memory")
        return list(activations.clone())


def members(count: int) -> list[Any]:
    return [SimpleNamespace(tokens=10, arrival_s=float(i), jobs=[object()]) for i in range(count)]


def test_a_smaller_step_is_taken_when_the_larger_ones_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is being handled holds the functions it came through, and so all that they held."""
    alive: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    short, company = Short(most=2), members(4)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(short.alive))
    outcome = take_step(short, company)
    assert [member for member, _ in outcome.taken] == company[:2]
    assert (outcome.too_large, outcome.failed, alive) == (40, [], [0])


def test_an_error_of_memory_holds_nothing_of_the_step() -> None:
    """Callers keep errors, a notebook the last one for as long as it runs."""
    short = Short(most=0)
    outcome = take_step(short, members(3))
    ((failed, error),) = outcome.failed
    assert isinstance(error, DeviceMemoryError) and isinstance(error.__cause__, torch.OutOfMemoryError)
    assert error.__cause__.__traceback__ is not None
    assert (failed.arrival_s, outcome.taken, short.alive) == (1.0, [], 0)
    short = Short(most=0)
    try:
        short.step([object()])
    except torch.OutOfMemoryError as caught:
        kept = out_of_memory(caught, "loading", torch.device("cpu"), "ask for less")
        assert short.alive == 0
    assert "loading" in str(kept)


def test_each_ones_own_step_finds_the_memory_of_the_failed_one_free() -> None:
    """Whose fault an error is shows when each takes its step alone; whoever is told keeps the error, and nothing else."""
    short = Short(most=0, error=ValueError("no such length"))
    outcome = take_step(short, members(2))
    assert [str(error) for _, error in outcome.failed] == ["no such length"] * 2
    assert (outcome.taken, short.alive_before, short.alive) == ([], [0, 0, 0], 0)


class Wrapping(Short):
    """Its errors come from others, as those of a capture do."""

    def __init__(self) -> None:
        super().__init__(most=0, error=RuntimeError("not permitted"))

    def step(self, jobs: Sequence[object]) -> list[Tensor]:
        try:
            return super().step(jobs)
        except RuntimeError as error:
            try:
                raise KeyError("a step of its own") from error
            except KeyError:
                raise ValueError("capturing failed")  # noqa: B904 - said without a cause, as code of others may


def test_an_error_that_came_from_another_holds_nothing_of_the_step_either() -> None:
    short = Wrapping()
    outcome = take_step(short, members(2))
    assert [str(error) for _, error in outcome.failed] == ["capturing failed"] * 2
    assert (short.alive_before, short.alive) == ([0, 0, 0], 0)


class Faulty(Short):
    """Its memory does for two; one of them asks for what cannot be computed."""

    def __init__(self, faulty: object) -> None:
        super().__init__(most=2)
        self.faulty = faulty

    def step(self, jobs: Sequence[object]) -> list[Tensor]:
        taken = super().step(jobs)
        if self.faulty in jobs:
            raise ValueError("no such length")
        return taken


def test_an_error_of_the_smaller_step_is_one_requests_own() -> None:
    """The engine took it for the end of its device, and every request for lost."""
    company = members(4)
    outcome = take_step(Faulty(company[1].jobs[0]), company)
    assert [member for member, _ in outcome.taken] == [company[0]]
    assert [(member, str(error)) for member, error in outcome.failed] == [(company[1], "no such length")]
    assert outcome.too_large == 40


def test_a_device_that_is_lost_in_the_smaller_step_is_nobodys_fault() -> None:
    with pytest.raises(ParallelError, match="gone"):
        take_step(Lost(), members(4))


class Lost:
    """Memory does not do, and then another process is gone."""

    def step(self, jobs: Sequence[object]) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory") if len(jobs) > 2 else ParallelError("process 1 is gone")
