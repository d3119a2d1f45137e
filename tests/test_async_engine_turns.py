"""The engine for asyncio, interrupted at every hand-over of the event loop: the engine under it holds nothing any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from loop_turns import Interruption, at_every_hand_over

from uso_engine import USOEngine
from uso_engine.api.events import Done
from uso_engine.async_engine import AsyncUSOEngine
from uso_engine.loading.awaited_load import AwaitedLoad
from uso_engine.sampling.step import Step

REQUEST: dict[str, Any] = {
    "prompt": "a fish",
    "image_size": {"width": 64, "height": 64},
    "num_inference_steps": 2,
    "seed": 1,
    "enable_safety_checker": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[USOEngine]:
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(engine: USOEngine) -> bytes:
    return engine.generate(**REQUEST).images[0].tobytes()


def look(step: Step) -> None:
    """An `on_step` that changes nothing."""


async def generate(shared: AsyncUSOEngine) -> bytes:
    return (await shared.generate(**REQUEST)).images[0].tobytes()


async def watch(shared: AsyncUSOEngine) -> bytes:
    return (await shared.generate(**REQUEST, on_step=look)).images[0].tobytes()


async def follow(shared: AsyncUSOEngine) -> bytes:
    async for event in shared.stream(**REQUEST, previews=True):
        if isinstance(event, Done):
            return event.result.images[0].tobytes()
    raise AssertionError("a stream that ends without its result")


@pytest.mark.parametrize("again", [None, 1])
@pytest.mark.parametrize("way", [generate, watch, follow])
def test_a_request_that_is_cancelled_in_any_turn_leaves_the_engine(
    way: Any, again: int | None, engine: USOEngine, alone: bytes
) -> None:
    queue = engine.loop.queue
    begun, ended = queue._accepted, sum(engine.statistics().outcomes.values())

    async def scenario(interruption: Interruption) -> None:
        shared = AsyncUSOEngine(engine)
        task = await interruption.of(way(shared))
        shared._opening.shutdown()  # What is still being opened is refused then.
        assert await asyncio.to_thread(queue.wait_until_empty, queue.clock() + 20)
        assert (engine.statistics().queued, engine.statistics().running) == (0, 0)
        assert engine.statistics().queued_bytes == 0
        assert not queue.scheduler.tickets
        if not task.cancelled():
            assert task.result() == alone

    assert at_every_hand_over(scenario, again=again) > 5
    # Each that was accepted has ended once, and the next one gets the picture of one alone.
    assert sum(engine.statistics().outcomes.values()) - ended == queue._accepted - begun
    assert engine.generate(**REQUEST).images[0].tobytes() == alone


class Loaded:
    """What stands for an engine that is loaded and closed."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def unloaded(load: Any) -> AsyncUSOEngine:
    made = AsyncUSOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32)
    made._load = AwaitedLoad("uso-tiny", load, made._opening)
    return made


@pytest.mark.parametrize("again", [None, 1])
@pytest.mark.parametrize("busy", [False, True])
def test_an_engine_whose_statement_is_cancelled_in_any_turn_is_closed_once(busy: bool, again: int | None) -> None:
    """Otherwise its weights would stay on the GPU for as long as the process lives.

    Args:
        busy: whether the event loop's own threads have other things to do, so that what they are given has to wait.
    """

    async def scenario(interruption: Interruption) -> None:
        engines, loop, end = list[Loaded](), asyncio.get_running_loop(), threading.Event()
        threads = ThreadPoolExecutor(1)
        loop.set_default_executor(threads)

        def load() -> USOEngine:
            engines.append(Loaded())
            return cast("USOEngine", engines[-1])

        async def use() -> None:
            async with made as shared:
                assert cast("Loaded", shared.engine).closed == 0
                if busy:
                    threads.submit(end.wait, 20)
                    loop.call_later(0.01, end.set)
                await asyncio.sleep(0)
                loop.call_soon(int)

        made = unloaded(load)
        await interruption.of(use())
        end.set()
        made._opening.shutdown()
        await loop.shutdown_default_executor()
        assert [one.closed for one in engines] == [1] * len(engines)

    assert at_every_hand_over(scenario, again=again) > 2
