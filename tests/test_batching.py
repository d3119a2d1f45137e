"""Requests that come, go, fail and are cancelled at any moment change nobody else's image: bits are those of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import small_transformer
from small_requests import SHAPES, HandTurnedLoop, SmallWork, Submitted, alone, image_jobs
from torch import Tensor

from uso_engine.api.events import Done
from uso_engine.errors import DeviceMemoryError, RequestCancelledError
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.step import Step
from uso_engine.scheduling.handle import Failed


@dataclass(frozen=True)
class Plan:
    """A request that a test makes, and what becomes of it.

    Args:
        shape: one of `SHAPES`.
        steps: of its run.
        images: of it.
        negative: whether it has a negative prompt.
        before: rounds that are taken before it comes.
        ends: how: "done", "cancelled" or "stopped" after some steps, "raises" in on_step, or the stage that fails.
        after: steps after which it is cancelled, stopped or raises.
        priority: of it.
    """

    shape: int
    steps: int
    images: int
    negative: bool
    before: int
    ends: str
    after: int
    priority: int


ENDS = ["done"] * 6 + ["cancelled", "stopped", "raises", "encode", "admit", "finish"]
PLANS = st.builds(
    Plan,
    shape=st.integers(0, len(SHAPES) - 1),
    steps=st.integers(1, 4),
    images=st.integers(1, 2),
    negative=st.booleans(),
    before=st.integers(0, 4),
    ends=st.sampled_from(ENDS),
    after=st.integers(1, 3),
    priority=st.integers(-1, 1),
)


@cache
def transformer_of(dtype: torch.dtype) -> Transformer:
    return small_transformer(dtype=dtype)


@cache
def images_of(dtype: torch.dtype, shape: int, steps: int, images: int, negative: bool) -> tuple[ImageJob, ...]:
    return tuple(image_jobs(transformer_of(dtype), shape, steps, images, negative=negative))


@cache
def alone_of(dtype: torch.dtype, shape: int, steps: int, negative: bool, image: int, taken: int) -> Tensor:
    """The latent of one image of a request by itself after some steps."""
    work = SmallWork([images_of(dtype, shape, steps, 2, negative)[image]])
    if taken == steps:
        return alone(transformer_of(dtype), work)[0]
    loop = HandTurnedLoop(transformer_of(dtype))
    request = loop.submit(work, wants_steps=True)
    while loop.loop.round():
        request.look(lambda step: step.stop() if step.index == taken - 1 else None)
    return request.latents[0]


class Visitor:
    """Looks at a request's steps and does what the plan says."""

    def __init__(self, plan: Plan, request: Submitted) -> None:
        self.plan, self.request, self.steps, self.raised = plan, request, 0, False

    def on_step(self, step: Step) -> None:
        self.steps += 1
        if self.steps < self.plan.after:
            return
        if self.plan.ends == "raises":
            raise KeyError("on_step raises")
        step.stop()

    def look(self) -> None:
        """As a caller would: an error of on_step cancels the request."""
        try:
            self.request.look(self.on_step)
        except KeyError:
            self.raised = True
            self.request.handle.cancel()


def submitted(loop: HandTurnedLoop, plan: Plan, dtype: torch.dtype) -> Visitor:
    work = SmallWork(list(images_of(dtype, plan.shape, plan.steps, plan.images, plan.negative)), fault=plan.ends)
    looks = plan.ends in ("stopped", "raises")
    return Visitor(plan, loop.submit(work, priority=plan.priority, wants_steps=looks))


def check(visitor: Visitor, dtype: torch.dtype) -> None:
    """An image that was finished is that of its request alone; one that was not says why."""
    plan, request = visitor.plan, visitor.request
    last = request.read()[-1]
    if isinstance(last, Failed):
        assert plan.ends != "done"
        expected = "cancelled" if plan.ends in ("cancelled", "raises") else f"{plan.ends} fails"
        assert expected in str(last.error)
        return
    taken = plan.steps
    if plan.ends == "stopped":
        taken = min(plan.steps, plan.after)
    assert plan.ends in ("done", "stopped", "cancelled") or visitor.steps < plan.after
    for image, latent in enumerate(request.latents):
        assert torch.equal(latent, alone_of(dtype, plan.shape, plan.steps, plan.negative, image, taken))


def check_many(plans: Sequence[Plan], step_tokens: int, memory_tokens: int | None, dtype: torch.dtype) -> None:
    """Let requests come and go, and check every image and that nothing is left."""
    loop = HandTurnedLoop(transformer_of(dtype), max_step_tokens=step_tokens)
    if memory_tokens is not None:
        loop.machine.memory_tokens = memory_tokens
    visitors: list[Visitor] = []

    def turn() -> bool:
        busy = loop.loop.round()
        for visitor in visitors:
            visitor.look()
            if visitor.plan.ends == "cancelled" and len(visitor.request.read()) >= 2 + visitor.plan.after:
                visitor.request.handle.cancel()
        return busy

    for plan in plans:
        for _ in range(plan.before):
            turn()
        visitors.append(submitted(loop, plan, dtype))
    idle = 0
    while idle < 2:  # A caller who looked makes the next round busy.
        idle = 0 if turn() else idle + 1
    for visitor in visitors:
        last = visitor.request.read()[-1]
        if isinstance(last, Failed) and isinstance(last.error, DeviceMemoryError):
            assert memory_tokens is not None
            assert visitor.request.work.tokens > memory_tokens
            continue
        check(visitor, dtype)
    assert loop.queue.requests == loop.queue.scheduler.tickets == ()
    assert len(loop.machine.denoiser._tables) == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PLANS, min_size=1, max_size=7), st.sampled_from([40, 160, 100_000]), st.sampled_from([None, None, 150]))
def test_company_arrivals_and_faults_change_no_bit(plans: list[Plan], step_tokens: int, memory_tokens: int | None) -> None:
    check_many(plans, step_tokens, memory_tokens, torch.float32)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PLANS, min_size=2, max_size=5))
def test_company_changes_no_bit_in_bfloat16(plans: list[Plan]) -> None:
    check_many(plans, 100_000, None, torch.bfloat16)


# Joining, leaving, cancelling, stopping and failing in the middle of the others' runs.
MIXTURE = [
    Plan(shape, 3, 1 + shape % 2, shape > 1, before, ends, 2, 0)
    for shape, before, ends in (
        (0, 0, "done"),
        (1, 1, "cancelled"),
        (2, 1, "done"),
        (3, 0, "raises"),
        (1, 2, "done"),
        (0, 1, "stopped"),
        (3, 1, "done"),
    )
]


def check_mixture() -> None:
    """What test_instruction_sets.py runs under every instruction set."""
    for dtype in (torch.float32, torch.bfloat16):
        check_many(MIXTURE, 100_000, None, dtype)


def test_a_mixture_of_everything() -> None:
    check_mixture()


def test_a_batch_is_formed_again_only_when_its_members_change() -> None:
    loop = HandTurnedLoop(transformer_of(torch.float32))
    for shape in (0, 1):
        loop.submit(SmallWork(list(images_of(torch.float32, shape, 4, 1, False))))
    loop.run()
    # The first alone, both, the second alone.
    assert loop.machine.batches_formed == 3
    assert sum(loop.machine.companies) == 8


def test_a_request_with_nan_in_its_latent_changes_nobody_elses() -> None:
    loop = HandTurnedLoop(transformer_of(torch.float32))
    spoiled = loop.submit(SmallWork(list(images_of(torch.float32, 1, 4, 1, False))), wants_steps=True)
    others = [loop.submit(SmallWork(list(images_of(torch.float32, shape, 4, 1, True)))) for shape in (0, 3)]

    def spoil(step: Step) -> None:
        step.latents[0].fill_(float("nan"))

    while loop.loop.round() or spoiled.handle.looking:
        spoiled.look(spoil)
    assert bool(spoiled.latents[0].isnan().all())
    for request, shape in zip(others, (0, 3), strict=True):
        assert torch.equal(request.latents[0], alone_of(torch.float32, shape, 4, True, 0, 4))


def test_memory_that_runs_out_costs_the_newest_alone() -> None:
    """A step is tried again without the newest half; what does not fit by itself fails, and the next request is answered."""
    loop = HandTurnedLoop(transformer_of(torch.float32))
    works = [SmallWork(list(images_of(torch.float32, 0, 3, images, False))) for images in (1, 1, 2)]
    loop.machine.memory_tokens = works[0].tokens
    requests = [loop.submit(work) for work in works]
    loop.run()
    for request in requests[:2]:
        assert torch.equal(request.latents[0], alone_of(torch.float32, 0, 3, False, 0, 3))
    assert isinstance(requests[2].error, DeviceMemoryError)
    assert loop.queue.counters.memory_retries >= 1
    # What did not fit is not tried again and again.
    assert loop.machine.companies == [1] * 6
    following = loop.submit(works[0])
    loop.run()
    assert torch.equal(following.latents[0], requests[0].latents[0])


def test_a_cancelled_request_leaves_at_the_next_step() -> None:
    loop = HandTurnedLoop(transformer_of(torch.float32))
    request = loop.submit(SmallWork(list(images_of(torch.float32, 0, 4, 1, False))))
    while not loop.machine.companies:
        loop.turn()
    request.handle.cancel()
    loop.run()
    assert isinstance(request.error, RequestCancelledError)
    assert len(loop.machine.companies) == 1
    assert request.request.jobs == []


@pytest.mark.parametrize("images", [1, 2])
def test_what_on_step_leaves_is_gone_on_from_in_company_too(images: int) -> None:
    """As alone: halved latents give the same image beside others."""

    def made(others: int) -> list[Tensor]:
        loop = HandTurnedLoop(transformer_of(torch.float32))
        request = loop.submit(SmallWork(list(images_of(torch.float32, 1, 3, images, False))), wants_steps=True)
        company = [loop.submit(SmallWork(list(images_of(torch.float32, 2, 3, 1, False)))) for _ in range(others)]

        def halve(step: Step) -> None:
            step.latents[0].mul_(0.5)

        while loop.loop.round() or request.handle.looking:
            request.look(halve)
        assert all(isinstance(entry.read()[-1], Done) for entry in company)
        return request.latents

    for first, second in zip(made(0), made(2), strict=True):
        assert torch.equal(first, second)
