"""The engine for asyncio, over the embedded model, beside threads that use the same one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from uso_engine import USOEngine, load_config
from uso_engine.api.events import Conditioning, Decoding, Done, Event, Queued, Stepped
from uso_engine.async_engine import AsyncUSOEngine
from uso_engine.errors import EngineClosedError, QueueFullError
from uso_engine.queue_limits import QueueLimits
from uso_engine.sampling.step import Step
from uso_engine.scheduling.queue import RequestQueue

SMALL: dict[str, Any] = {"prompt": "a fish", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 3}
LONG: dict[str, Any] = {**SMALL, "num_inference_steps": 50}
REQUESTS: list[dict[str, Any]] = [
    {**SMALL, "seed": 1},
    {**SMALL, "seed": 2, "negative_prompt": "a cup", "num_inference_steps": 4},
    {**SMALL, "seed": 3, "image_size": {"width": 96, "height": 64}},
    {**SMALL, "seed": 4, "num_images": 2, "images": [None, Image.radial_gradient("L").convert("RGB")]},
]


@pytest.fixture(scope="module")
def engine() -> Iterator[USOEngine]:
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(engine: USOEngine) -> list[list[bytes]]:
    return [pictures(engine.generate(**request)) for request in REQUESTS]


def pictures(result: Any) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def test_requests_together_get_the_images_of_each_alone(engine: USOEngine, alone: list[list[bytes]]) -> None:
    """Tasks of one event loop and threads that wait, at once, over one model."""
    shared, threads = AsyncUSOEngine(engine), dict[int, list[bytes]]()

    def wait(number: int) -> None:
        threads[number] = pictures(engine.generate(**REQUESTS[number]))

    async def together() -> list[Any]:
        return await asyncio.gather(*(shared.generate(**request) for request in REQUESTS))

    waiting = [threading.Thread(target=wait, args=(number,)) for number in range(len(REQUESTS))]
    for thread in waiting:
        thread.start()
    results = asyncio.run(together())
    for thread in waiting:
        thread.join()
    assert [pictures(result) for result in results] == alone
    assert [threads[number] for number in range(len(REQUESTS))] == alone
    assert all(list(result.timings)[:2] == ["queue", "images"] for result in results)


def test_a_stream_tells_everything_in_order(engine: USOEngine, alone: list[list[bytes]]) -> None:
    async def events(**more: Any) -> list[Event]:
        return [event async for event in AsyncUSOEngine(engine).stream(**REQUESTS[0], **more)]

    told = asyncio.run(events())
    assert told[:-1] == [Queued(0), Conditioning(), Stepped(0, 3), Stepped(1, 3), Stepped(2, 3), Decoding()]
    assert isinstance(told[-1], Done)
    assert pictures(told[-1].result) == alone[0]
    shown = [event.preview for event in asyncio.run(events(previews=True)) if isinstance(event, Stepped)]
    assert len(shown) == 3
    assert any(isinstance(preview, Image.Image) for preview in shown)


def test_cancelling_a_task_or_closing_a_stream_cancels_the_request(engine: USOEngine) -> None:
    shared = AsyncUSOEngine(engine)

    async def cancelled() -> None:
        stream = shared.stream(**LONG)
        async for event in stream:
            if isinstance(event, Stepped):
                break
        await stream.aclose()
        begun, running = asyncio.Event(), asyncio.get_running_loop()

        def tell(step: Step) -> None:
            running.call_soon_threadsafe(begun.set)

        task = asyncio.create_task(shared.generate(**LONG, on_step=tell))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = shared.statistics().outcomes.get("cancelled", 0)
    asyncio.run(cancelled())
    engine.loop.queue.wait_until_empty()
    assert shared.statistics().outcomes["cancelled"] == before + 2
    assert (shared.statistics().queued, shared.statistics().running) == (0, 0)


def test_on_step_may_look_change_stop_and_raise(engine: USOEngine) -> None:
    shared, seen = AsyncUSOEngine(engine), list[int]()

    def stop(step: Step) -> None:
        seen.append(step.index)
        assert engine.preview(step).size
        step.stop()

    def fail(step: Step) -> None:
        raise KeyError("enough")

    async def both() -> tuple[Any, Any]:
        return await asyncio.gather(
            shared.generate(**REQUESTS[0], on_step=stop), shared.generate(**REQUESTS[0], on_step=fail), return_exceptions=True
        )

    stopped, failed = asyncio.run(both())
    assert seen == [0]
    assert stopped.parameters["steps_taken"] == 1
    assert isinstance(failed, KeyError)


def test_an_engine_of_its_own_loads_and_closes_with_its_statement() -> None:
    limits = QueueLimits(max_requests=1)

    async def use() -> AsyncUSOEngine:
        made = AsyncUSOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32, queue=limits)
        assert made.failure is None
        with pytest.raises(EngineClosedError, match="is not loaded"):
            made.statistics()
        async with made as shared:
            first = asyncio.create_task(shared.generate(**LONG))
            while not shared.statistics().running:
                await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match=r"queue\.max_requests is 1"):
                await shared.generate(**SMALL)
            assert await shared.drain(0) == 1
            with pytest.raises(Exception, match="drained"):
                await first
        return made

    before = set(threading.enumerate())
    closed = asyncio.run(use())
    with pytest.raises(EngineClosedError):
        closed.statistics()
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if thread.name == "uso-engine denoising"]


@pytest.mark.parametrize("looks", [False, True])
def test_requests_that_have_begun_are_finished_by_an_engine_that_is_closed(looks: bool) -> None:
    """Its tasks get their results, also where they look at steps meanwhile."""
    seen: list[int] = []

    async def use() -> tuple[Any, list[Event]]:
        on_step = {"on_step": lambda step: seen.append(step.index)} if looks else {}
        async with AsyncUSOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as shared:
            waits = asyncio.create_task(shared.generate(**{**LONG, **on_step}))
            events = asyncio.create_task(told(shared))
            while shared.statistics().running < 2:
                await asyncio.sleep(0)
        return await waits, await events

    async def told(shared: AsyncUSOEngine) -> list[Event]:
        return [event async for event in shared.stream(**SMALL)]

    result, events = asyncio.run(use())
    assert result.parameters["steps_taken"] == 50
    assert isinstance(events[-1], Done)
    assert seen == (list(range(50)) if looks else [])


def test_statistics_count_a_request_that_ends_meanwhile(engine: USOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose work another thread lets go of between two looks at it."""

    class Ending:
        begun = True

        def __init__(self) -> None:
            self.left = [SimpleNamespace(size_bytes=7)]

        @property
        def work(self) -> SimpleNamespace | None:
            return self.left.pop() if self.left else None

    monkeypatch.setattr(RequestQueue, "requests", property(lambda queue: (Ending(),)))
    assert engine.statistics().queued_bytes == 7


def test_a_request_outside_the_limits_is_an_error_of_its_task(engine: USOEngine) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        asyncio.run(AsyncUSOEngine(engine).generate(prompt="x", num_inference_steps=0))
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"priority": 11}, "priority must be a whole number from -10 to 10, got 11"),
        ({"timeout_s": 0}, "timeout_s must be a number of seconds over 0, or None, got 0"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            engine.generate(**SMALL, **wrong)


def test_loras_of_a_request_are_in_the_weights_for_it_alone(engine: USOEngine) -> None:
    from uso_engine import ResearchOptions

    lora = load_config("uso-tiny").loras[0].path
    plain = pictures(engine.generate(**REQUESTS[0]))
    changed = engine.generate(**REQUESTS[0], research=ResearchOptions(loras=[(lora, -0.5)]))
    assert pictures(changed) != plain
    assert [entry["weight"] for entry in changed.parameters["loras"]] == [1.0, -0.5]  # type: ignore[attr-defined]
    assert pictures(engine.generate(**REQUESTS[0])) == plain
    engine.set_loras([(lora, -0.5)])
    assert pictures(engine.generate(**REQUESTS[0])) == pictures(changed)
    engine.set_loras([])
    assert pictures(engine.generate(**REQUESTS[0])) == plain
    with pytest.raises(FileNotFoundError):
        engine.generate(**REQUESTS[0], research=ResearchOptions(loras=["nowhere.safetensors"]))


@pytest.mark.parametrize("queue", [3, "x", {"max_requests": 1}])
def test_limits_of_another_type_are_refused_before_loading(queue: object) -> None:
    with pytest.raises(ValueError, match="queue must be QueueLimits, got "):
        AsyncUSOEngine.from_config("uso-tiny", queue=queue)  # type: ignore[arg-type]


@pytest.mark.parametrize("deadline_s", [-1, float("nan"), "x", None, True])
def test_a_deadline_that_is_none_drains_nothing(engine: USOEngine, deadline_s: object) -> None:
    async def drain() -> None:
        with pytest.raises(ValueError, match="deadline_s must be a number of seconds from 0, got "):
            await AsyncUSOEngine(engine).drain(deadline_s)  # type: ignore[arg-type]

    asyncio.run(drain())
    assert not engine.loop.queue.acceptance.draining


@pytest.mark.parametrize("deadline_s", [np.float32(5), 1e300, 10**400])
def test_a_deadline_longer_than_a_thread_can_wait_is_none(deadline_s: float) -> None:
    async def drain() -> int:
        async with AsyncUSOEngine.from_config("uso-tiny", device="cpu") as own:
            request = asyncio.create_task(own.generate("a fish", seed=1, image_size={"width": 64, "height": 64}))
            while not own.statistics().steps:
                await asyncio.sleep(0)
            left = await own.drain(deadline_s)
            assert len((await request).images) == 1
            return left

    assert asyncio.run(drain()) == 0
