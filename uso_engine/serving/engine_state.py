"""Where the engine stands: loading, ready, draining, failed. Requests get it when it is ready and a 503 otherwise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal

from .refusal import RETRY_AFTER_S, Refusal
from .served_engine import ServedEngine

logger = logging.getLogger(__name__)

Phase = Literal["loading", "ready", "draining", "failed"]
OpenEngine = Callable[[], AbstractAsyncContextManager[ServedEngine]]
"""Loads and warms up an engine; leaving it closes the engine."""
_LOADING_RETRY_S = 10.0


class EngineState:
    """The engine of one server; loaded beside it, so that the server can say that it is not ready.

    Args:
        open_engine: loads it.

    Attributes:
        on_failure: told why it could not be loaded.
    """

    def __init__(self, open_engine: OpenEngine) -> None:
        self._open = open_engine
        self.on_failure: Callable[[BaseException], None] | None = None
        self._engine: ServedEngine | None = None
        self._phase: Phase = "loading"
        self._drained = False

    @property
    def drained(self) -> bool:
        """Whether the server is ending, and has finished or cut off all that ran."""
        return self._drained

    @property
    def phase(self) -> Phase:
        """Where it stands now; an engine whose thread is dead has failed."""
        if self._phase == "ready" and self._engine is not None and self._engine.failure is not None:
            return "failed"
        return self._phase

    @property
    def engine(self) -> ServedEngine | None:
        """The engine, for what may look at it in any phase; None before it is loaded."""
        return self._engine

    def ready(self) -> ServedEngine:
        """The engine, for a request.

        Raises:
            Refusal: 503 in any other phase.
        """
        phase = self.phase
        if phase != "ready" or self._engine is None:
            wait = _LOADING_RETRY_S if phase == "loading" else RETRY_AFTER_S
            raise Refusal(503, "The engine is not ready.", errors=[f"it is {phase}"], retry_after_s=wait)
        return self._engine

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load in the background, and close at the end."""
        ending = asyncio.Event()
        task = asyncio.create_task(self._hold(ending))
        try:
            yield
        finally:
            ending.set()
            if self._engine is None:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _hold(self, ending: asyncio.Event) -> None:
        # One task enters and leaves: an engine may insist on that.
        try:
            async with self._open() as engine:
                self._engine = engine
                if self._phase == "loading":  # and not told to end meanwhile
                    self._phase = "ready"
                    logger.info("the engine is ready")
                try:
                    await ending.wait()
                finally:
                    self._engine = None
        except Exception as error:
            if self._phase in ("ready", "draining"):
                raise
            self._phase = "failed"
            logger.error("the engine could not be loaded: %s", error)
            if self.on_failure is not None:
                self.on_failure(error)

    async def drain(self, deadline_s: float) -> None:
        """Take no more requests and let the running ones finish."""
        was = self._phase
        if was != "failed":
            self._phase = "draining"
        if was == "ready" and self._engine is not None:
            cut = await self._engine.drain(deadline_s)
            logger.info("drained; %d requests were cut off", cut)
        self._drained = True
