"""The engine for asyncio: requests are awaited, or told about step by step, while others go on."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from . import call_arguments
from .api.events import Done, Event
from .api.fields import checked_switch
from .api.messages import shown
from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .api.result import GenerationResult
from .api.statistics import EngineStatistics
from .config import EngineConfig, load_config
from .engine import USOEngine
from .errors import EngineClosedError
from .generation import Generation
from .imaging.open import ImageLimits
from .loading.awaited_load import AwaitedLoad
from .loading.transformer import LoadProgress
from .preparation import prepare
from .process_bound import ProcessBound
from .queue_limits import QueueLimits
from .request_type import request_type_of
from .sampling.step import OnStep
from .sampling.watched_steps import WatchedSteps
from .sampling_settings import QualityName
from .scheduling.handle import Message, RequestHandle, StepTaken, taken
from .scheduling.threads import hand_over
from .scheduling.waiting import look, put_in_line

Result = TypeVar("Result")
OPENING_THREADS = 8
"""Requests whose inputs are fetched and decoded at once."""


class AsyncUSOEngine(ProcessBound):
    """An engine whose requests are awaited; usable in an ``async with`` statement.

    It may be used from any number of event loops, and its `USOEngine` from any thread beside it.

    Args:
        engine: a loaded one; it stays the caller's, but `aclose` closes it.
    """

    def __init__(self, engine: USOEngine) -> None:
        self._engine: USOEngine | None = engine
        self._load: AwaitedLoad[USOEngine] | None = None
        self._is_closed = False
        self.config = engine.config
        self.request_type = engine.request_type
        self._opening = concurrent.futures.ThreadPoolExecutor(OPENING_THREADS, thread_name_prefix="uso-engine opening")

    @classmethod
    def from_config(
        cls,
        config: str | Path | EngineConfig,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        memory_budget_gib: float | None = None,
        image_limits: ImageLimits | None = None,
        progress: LoadProgress | None = None,
        queue: QueueLimits | None = None,
    ) -> AsyncUSOEngine:
        """An engine that is loaded, in a thread, when its ``async with`` statement begins.

        Where loading fails or is cancelled, nothing is left of it, and another ``async with`` statement loads again. Once
        closed, as at such a statement's end, it stays closed: another statement is refused with `EngineClosedError`.

        Args:
            config: as for `USOEngine.from_config`, and so are the others;
            device: likewise.
            dtype: likewise.
            attention: likewise.
            memory_budget_gib: likewise.
            image_limits: likewise.
            progress: likewise.
            queue: what may wait and for how long, instead of the configuration's.

        Raises:
            MissingFileError, ConfigError, ValueError: a configuration that cannot be used; loading may raise more.
        """
        call_arguments.check_loading(config, device, dtype, attention, image_limits, progress)
        if not isinstance(queue, QueueLimits | None):
            raise ValueError(f"queue must be QueueLimits, got {shown(queue)}")
        loaded = config if isinstance(config, EngineConfig) else load_config(config)
        if queue is not None:
            loaded = loaded.model_copy(update={"queue": queue})
        made = cls.__new__(cls)
        made.config, made.request_type = loaded, request_type_of(loaded)
        made._engine, made._is_closed = None, False
        load = partial(
            USOEngine.from_config,
            loaded,
            device=device,
            dtype=dtype,
            attention=attention,
            memory_budget_gib=memory_budget_gib,
            image_limits=image_limits,
            progress=progress,
        )
        made._opening = concurrent.futures.ThreadPoolExecutor(OPENING_THREADS, thread_name_prefix="uso-engine opening")
        made._load = AwaitedLoad(loaded.name, load, made._opening)
        return made

    async def __aenter__(self) -> Self:
        if self._engine is None and not self._is_closed and self._load is not None:
            self._engine = await self._load.loaded()
            if self._is_closed:  # By another task meanwhile.
                await self.aclose()
        if self._is_closed:
            raise self._missing()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def engine(self) -> USOEngine:
        """The same loaded model for threads that wait.

        Raises:
            EngineClosedError: it was closed, or is not loaded; says why and what to do.
        """
        if self._engine is None:
            raise self._missing()
        return self._engine

    @property
    def failure(self) -> BaseException | None:
        """Why the engine can compute no more; None while it can."""
        return None if self._engine is None else self._engine.loop.queue.acceptance.failure

    @property
    def places(self) -> int:
        """Requests that it accepts before the first of them is done; one more is refused with `QueueFullError`."""
        return self.config.queue.max_requests

    def statistics(self) -> EngineStatistics:
        """What is waiting and running, and what was done since the engine was loaded."""
        return self.engine.statistics()

    async def generate(
        self,
        request: GenerationRequest | str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        on_step: OnStep | None = None,
        research: ResearchOptions | None = None,
        quality: QualityName | None = None,
        **fields: object,
    ) -> GenerationResult:
        """Make the images of a request; cancelling the task cancels it at its next step.

        Args:
            request: what to make, or its prompt; or give its fields as keywords.
            priority: as for `USOEngine.generate`.
            timeout_s: likewise.
            on_step: called after each denoising step in a thread beside the event loop, while other requests go on.
            research: additions that no request schema offers.
            quality: as for `USOEngine.generate`.
            fields: of `GenerationRequest`.

        Raises:
            ValueError and others: as for `USOEngine.generate`.
        """
        on_step = call_arguments.checked_on_step(on_step)
        watched = None if on_step is None else WatchedSteps(on_step)
        ways, device = (research, quality), self.engine.loop.device
        async with self._messages(request, fields, ways, priority, timeout_s, watched=watched) as (messages, handle):
            while True:
                message = taken(await messages.get(), device)
                if isinstance(message, Done):
                    return message.result
                if isinstance(message, StepTaken) and watched is not None:
                    await self._in_thread(look, message, watched, handle, device)
                del message  # Which an error would hold, and its latents.

    async def stream(
        self,
        request: GenerationRequest | str | None = None,
        *,
        previews: bool = False,
        priority: int = 0,
        timeout_s: float | None = None,
        research: ResearchOptions | None = None,
        quality: QualityName | None = None,
        **fields: object,
    ) -> AsyncGenerator[Event, None]:
        """What happens to a request, as it happens, up to `Done`; closing the iterator cancels it at its next step.

        Args:
            request: as for `generate`, and so are the others.
            previews: whether steps come with a small picture of the first image.
            priority: likewise.
            timeout_s: likewise.
            research: likewise.
            quality: likewise.
            fields: likewise.

        Raises:
            ValueError and others: as for `USOEngine.generate`.
        """
        previews = checked_switch("previews", previews)
        ways, device = (research, quality), self.engine.loop.device
        async with self._messages(request, fields, ways, priority, timeout_s, previews=previews) as (messages, _):
            while True:
                message = taken(await messages.get(), device)
                if not isinstance(message, StepTaken):
                    yield message
                if isinstance(message, Done):
                    return

    async def drain(self, deadline_s: float) -> int:
        """Accept no more requests and finish those that are there.

        Args:
            deadline_s: seconds after which the rest is cut off, with `EngineDrainingError`.

        Returns:
            How many were cut off.

        Raises:
            ValueError: no number of seconds.
        """
        return await asyncio.to_thread(self.engine.loop.drain, call_arguments.checked_deadline(deadline_s))

    async def aclose(self) -> None:
        """Close the engine; waits for requests that have begun, fails the others. A second call does nothing.

        Cancelled, it waits no longer, and the engine is closed all the same.
        """
        engine, self._engine, self._is_closed = self._engine, None, True
        if self._load is not None:
            self._load.close()
        try:
            if engine is not None:
                # Shielded, because a call that still waits for a thread would be forgotten.
                await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, engine.close))
        finally:
            self._opening.shutdown(wait=False)

    @asynccontextmanager
    async def _messages(
        self,
        request: GenerationRequest | str | None,
        fields: dict[str, object],
        ways: tuple[ResearchOptions | None, QualityName | None],
        priority: int,
        timeout_s: float | None,
        *,
        previews: bool = False,
        watched: WatchedSteps | None = None,
    ) -> AsyncIterator[tuple[asyncio.Queue[Message], RequestHandle]]:
        """The messages of a request, which is cancelled if it has not ended by the end."""
        priority, timeout_s = call_arguments.checked_scheduling(priority, timeout_s)
        engine, event_loop = self.engine, asyncio.get_running_loop()
        messages: asyncio.Queue[Message] = asyncio.Queue()

        def deliver(message: Message) -> None:
            event_loop.call_soon_threadsafe(messages.put_nowait, message)

        handle = RequestHandle(wants_steps=watched is not None, wants_previews=previews, deliver=deliver)

        def begin() -> None:
            generation: Generation = prepare(engine.parts, engine.request_type, request, fields, *ways)
            generation.watched = watched
            put_in_line(engine.loop, handle, generation, priority, timeout_s)

        try:
            hand_over(engine.loop.device)
            await self._in_thread(begin)
            yield messages, handle
        finally:
            handle.cancel()

    def _missing(self) -> EngineClosedError:
        if self._load is None or self._is_closed:
            return EngineClosedError(f"engine {self.config.name} was closed; make a new one with AsyncUSOEngine.from_config")
        return self._load.missing

    async def _in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._opening, partial(work, *arguments))
