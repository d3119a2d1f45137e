"""Requests for replicas, interrupted at every hand-over of the event loop: cancelled, at their deadline, while draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from loop_turns import CountingLoop, Interruption, at_every_hand_over
from test_ray_remote_engine import Replicas, Reply, events_of, request, whole

from uso_engine.api.events import Done
from uso_engine.errors import EngineDeadError, EngineDrainingError, RequestTimeoutError
from uso_engine.serving.ray.messages import Message, Order
from uso_engine.serving.ray.remote_engine import RemoteEngine

DEADLINE_S = 600.0


async def in_turns(order: Order, **how: Any) -> AsyncGenerator[Message, None]:
    """What a replica says, a message every other turn."""
    async with aclosing(whole(order, **how)) as messages:
        async for message in messages:
            await asyncio.sleep(0)
            yield message


def lost(order: Order) -> AsyncGenerator[Message, None]:
    return in_turns(order, stop=5)


async def answered(engine: RemoteEngine) -> int:
    return (await engine.generate(request(seed=5), timeout_s=DEADLINE_S)).seed


async def told(engine: RemoteEngine) -> int:
    events = [event async for event in engine.stream(request(seed=5), timeout_s=DEADLINE_S)]
    assert isinstance(events[-1], Done)
    return events[-1].result.seed


def holds_nothing(engine: RemoteEngine, replicas: Replicas) -> bool:
    return not engine._running and not engine._fleet._active and replicas.left == len(replicas.orders) and engine._idle.is_set()


@pytest.mark.parametrize("again", [None, 1, 2])
@pytest.mark.parametrize("replies", [[in_turns], [lost, in_turns], [lost, lost]], ids=["one", "another", "lost"])
@pytest.mark.parametrize("way", [answered, told])
@pytest.mark.parametrize("ends", ["cancelled", "deadline"])
def test_a_request_for_a_replica_ends_once_in_any_turn(ends: str, way: Any, replies: list[Reply], again: int | None) -> None:
    async def scenario(interruption: Interruption) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        replicas = Replicas(replies)
        engine = replicas.engine()
        task = await interruption.of(way(engine), (lambda: loop.skip(DEADLINE_S)) if ends == "deadline" else None)
        assert holds_nothing(engine, replicas)
        if interruption.happened and ends == "cancelled":
            assert task.cancelled()
        elif isinstance(task.exception(), RequestTimeoutError):
            assert interruption.happened
        elif replies[-1] is lost:
            assert isinstance(task.exception(), EngineDeadError)
        else:
            assert task.result() == 5

    assert at_every_hand_over(scenario, again=again) > 8


@pytest.mark.parametrize("ends", ["cancelled", "deadline"])
def test_draining_that_ends_in_any_turn_counts_what_runs(ends: str) -> None:
    async def scenario(interruption: Interruption) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        replicas = Replicas([in_turns])
        engine = replicas.engine()
        running = asyncio.ensure_future(events_of(engine))
        await asyncio.sleep(0)
        task = await interruption.of(engine.drain(DEADLINE_S), (lambda: loop.skip(DEADLINE_S)) if ends == "deadline" else None)
        if not task.cancelled():
            # One that is cut off may end in the same turn; none is said to be left only where there is none.
            assert task.result() == 1 if not engine._idle.is_set() else task.result() in (0, interruption.happened)
            assert engine._draining
        if engine._draining:
            with pytest.raises(EngineDrainingError):
                await engine.generate(request())
        assert isinstance((await running)[-1], Done)
        assert holds_nothing(engine, replicas)

    assert at_every_hand_over(scenario) > 5
