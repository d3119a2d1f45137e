"""A server's engine whose server ends in any turn of the event loop: what was opened is closed once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from loop_turns import Interruption, at_every_hand_over
from served_double import DoubleEngine

from uso_engine.config import load_config
from uso_engine.errors import MissingFileError
from uso_engine.serving.engine_state import EngineState

CONFIG = load_config("uso-tiny")


@pytest.mark.parametrize("again", [None, 1, 2])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("ends", ["cancelled", "at its end"])
def test_what_a_server_opened_is_closed_once(ends: str, fails: bool, again: int | None) -> None:
    async def scenario(interruption: Interruption) -> None:
        opened = closing = closed = 0
        failures, end = list[BaseException](), asyncio.Event()

        @asynccontextmanager
        async def opening() -> AsyncIterator[DoubleEngine]:
            nonlocal opened, closing, closed
            await asyncio.sleep(0)
            opened += 1
            try:
                await asyncio.to_thread(int)
                if fails:
                    raise MissingFileError("no weights")
                yield DoubleEngine(CONFIG)
            finally:
                closing += 1
                for _ in range(4):
                    await asyncio.sleep(0)
                closed += 1

        state = EngineState(opening)
        state.on_failure = failures.append

        async def serve() -> None:
            async with state.running():
                while state.phase == "loading" and not end.is_set():
                    await asyncio.sleep(0)

        await interruption.of(serve(), end.set if ends == "at its end" else None)
        assert opened == closing
        # A server that is told to end waits until it is closed; one that is cancelled gives up waiting, too.
        assert closed == closing or ends == "cancelled" or fails
        assert state.engine is None
        assert [type(error) for error in failures] == ([MissingFileError] if state.phase == "failed" else [])
        if not interruption.happened:
            assert state.phase == ("failed" if fails else "ready")

    assert at_every_hand_over(scenario, again=again) > 3
