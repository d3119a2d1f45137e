"""An engine in `async with` statements: loaded again after a failed or given-up load, never twice at once, nor once closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
from loop_turns import Interruption, at_every_hand_over

from uso_engine import AsyncUSOEngine, USOEngine
from uso_engine.errors import DeviceMemoryError, EngineClosedError
from uso_engine.loading.awaited_load import AwaitedLoad

CLOSED = r"engine uso-tiny was closed; make a new one with AsyncUSOEngine\.from_config"


class Loads:
    """Loads that tests let go on; says how many engines there were at once."""

    def __init__(self) -> None:
        self.begun, self.open, self.most, self.closed = 0, 0, 0, 0
        self.failures: list[Exception] = []
        self.may_end = threading.Event()
        self.has_begun = threading.Event()
        self._lock = threading.Lock()

    def __call__(self) -> USOEngine:
        with self._lock:
            self.begun, self.open = self.begun + 1, self.open + 1
            self.most = max(self.most, self.open)
        self.has_begun.set()
        assert self.may_end.wait(20)
        if self.failures:
            with self._lock:
                self.open -= 1
            raise self.failures.pop()
        return cast("USOEngine", self)

    def close(self) -> None:
        with self._lock:
            self.open, self.closed = self.open - 1, self.closed + 1


@pytest.fixture
def loads() -> Iterator[Loads]:
    made = Loads()
    made.may_end.set()
    yield made
    made.may_end.set()


def unloaded(load: Callable[[], USOEngine]) -> AsyncUSOEngine:
    made = AsyncUSOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32)
    made._load = AwaitedLoad("uso-tiny", load, made._opening)
    return made


def test_a_load_that_failed_is_done_again_by_the_next_statement(loads: Loads) -> None:
    loads.failures = [DeviceMemoryError("no room")]
    made = unloaded(loads)

    async def use() -> None:
        with pytest.raises(DeviceMemoryError, match="no room"):
            async with made:
                pytest.fail("the statement has begun")
        told = (
            r"uso-tiny is not loaded: loading failed \(DeviceMemoryError: no room\); use it in an `async with` .* tries again"
        )
        with pytest.raises(EngineClosedError, match=told):
            await made.generate("x")
        async with made as shared:
            assert shared.engine is cast("USOEngine", loads)
            assert loads.open == 1
        assert loads.closed == 1

    asyncio.run(use())
    assert (loads.begun, loads.open) == (2, 0)


def test_a_file_that_has_come_meanwhile_is_found() -> None:
    """With a real engine: what failed has left nothing that a second load stumbles over."""
    made, fails = (
        AsyncUSOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32),
        [OSError("a disk that is not there")],
    )
    load = cast("AwaitedLoad[USOEngine]", made._load)
    whole = load._load

    def later() -> USOEngine:
        if fails:
            raise fails.pop()
        return whole()

    load._load = later

    async def use() -> None:
        with pytest.raises(OSError, match="a disk"):
            await made.__aenter__()
        async with made as shared:
            result = await shared.generate(
                "x", image_size={"width": 64, "height": 64}, num_inference_steps=1, seed=1, enable_safety_checker=False
            )
            assert result.images[0].size == (64, 64)

    asyncio.run(use())


def test_a_load_that_was_given_up_is_over_before_another_begins(loads: Loads) -> None:
    """Two at once would need the memory of two."""
    loads.may_end.clear()
    made = unloaded(loads)

    async def use() -> None:
        first = asyncio.create_task(made.__aenter__())
        await asyncio.to_thread(loads.has_begun.wait, 20)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(EngineClosedError, match="is not loaded: loading was cancelled; use it"):
            made.statistics()
        second = asyncio.create_task(made.__aenter__())
        await asyncio.sleep(0.01)
        with pytest.raises(EngineClosedError, match="not loaded yet: another `async with` statement is loading it"):
            await made.__aenter__()
        assert loads.begun == 1
        loads.may_end.set()
        await second
        assert (loads.begun, loads.open, loads.most) == (2, 1, 1)
        await made.aclose()

    asyncio.run(use())
    assert loads.closed == 2


@pytest.mark.parametrize("again", [None, 1])
def test_given_up_in_any_turn_it_is_loaded_by_the_next_statement(again: int | None) -> None:
    async def scenario(interruption: Interruption) -> None:
        loads, threads = Loads(), ThreadPoolExecutor(1)
        loads.may_end.set()
        asyncio.get_running_loop().set_default_executor(threads)
        made = unloaded(loads)

        async def use() -> None:
            await made.__aenter__()

        task = await interruption.of(use())
        async with made as shared:
            assert shared.engine is cast("USOEngine", loads)
            # Where the first one was there before it was interrupted, it is the same.
            assert (loads.begun, loads.open, loads.most) == (1 + loads.closed, 1, 1)
            assert task.cancelled() or loads.begun == 1
        assert loads.open == 0

    assert at_every_hand_over(scenario, again=again) > 1


def test_a_closed_engine_stays_closed_and_says_so(loads: Loads) -> None:
    async def use() -> None:
        made = unloaded(loads)
        async with made:
            pass
        never = unloaded(loads)
        await never.aclose()
        for closed in (made, never):
            with pytest.raises(EngineClosedError, match=CLOSED):
                await closed.__aenter__()
            with pytest.raises(EngineClosedError, match=CLOSED):
                _ = closed.engine
            await closed.aclose()
        assert (loads.begun, loads.closed) == (1, 1)

    asyncio.run(use())


def test_what_is_closed_while_it_loads_is_closed_when_it_is_there(loads: Loads) -> None:
    loads.may_end.clear()

    async def use() -> None:
        made = unloaded(loads)
        entering = asyncio.create_task(made.__aenter__())
        await asyncio.to_thread(loads.has_begun.wait, 20)
        await made.aclose()
        loads.may_end.set()
        with pytest.raises(EngineClosedError, match=CLOSED):
            await entering

    asyncio.run(use())
    assert (loads.begun, loads.closed, loads.open) == (1, 1, 0)


def test_what_is_closed_while_it_waits_for_a_load_that_was_given_up_is_not_loaded(loads: Loads) -> None:
    loads.may_end.clear()

    async def use() -> None:
        made = unloaded(loads)
        first = asyncio.create_task(made.__aenter__())
        await asyncio.to_thread(loads.has_begun.wait, 20)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(made.__aenter__())
        await asyncio.sleep(0.01)
        await made.aclose()
        loads.may_end.set()
        with pytest.raises(EngineClosedError, match=CLOSED):
            await second

    asyncio.run(use())
    assert (loads.begun, loads.closed, loads.open) == (1, 1, 0)
