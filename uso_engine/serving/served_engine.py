"""What the server asks of an engine; `uso_engine.async_engine.AsyncUSOEngine` has it, and tests have a double."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from uso_engine.api.events import Event
from uso_engine.api.request import GenerationRequest
from uso_engine.api.result import GenerationResult
from uso_engine.api.statistics import EngineStatistics
from uso_engine.config import EngineConfig


class ServedEngine(Protocol):
    """An engine that many requests are put into at once."""

    @property
    def config(self) -> EngineConfig:
        """What it was made from."""

    @property
    def failure(self) -> BaseException | None:
        """Why it is dead, or None."""

    @property
    def places(self) -> int:
        """Requests that it takes at once; of one more it says that it is full."""

    async def generate(
        self, request: GenerationRequest, /, *, priority: int = 0, timeout_s: float | None = None
    ) -> GenerationResult:
        """The images of a request; cancelling the task cancels it."""

    def stream(
        self, request: GenerationRequest, /, *, previews: bool = False, priority: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """What happens to a request, its images last; closing the iterator cancels it."""

    async def drain(self, deadline_s: float) -> int:
        """Accept no more and finish what runs; how many requests were cut off."""

    def statistics(self) -> EngineStatistics:
        """Counts, for metrics."""
