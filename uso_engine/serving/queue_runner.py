"""Working through fal's queue: a few requests at a time are given to the engine; the rest waits."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

from uso_engine.errors import QueueFullError

from .fal_answer import fal_call
from .in_thread import in_thread
from .queue_records import QueuedRequest, QueueRecords, QueueState
from .refusal import Refusal, refusal_of
from .service import Service
from .wire_request import engine_request

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
_MOST_TRIES = 5
_RETRY_S = 2.0
_DELIVERY_S = 10.0


@dataclass(order=True)
class _Waiting:
    """One request that this server answers for; they sort in the order in which they are taken."""

    rank: int  # its priority, negated
    id: str
    key: str = field(compare=False)
    model: str = field(compare=False)
    running: asyncio.Task[None] | None = field(default=None, compare=False)
    cancelled: bool = field(default=False, compare=False)
    finishing: bool = field(default=False, compare=False)  # Its answer is being written: too late to cancel.


@dataclass(frozen=True)
class QueueView:
    """What a client is told of a request.

    Args:
        state: where it stands.
        position: requests before it, while it waits.
    """

    state: QueueState
    position: int | None = None


class QueueRunner:
    """The durable queue of one server.

    Args:
        service: runs and delivers.
        records: the queue's files.
        owner: what this server calls itself there.
        clock: seconds since 1970.
    """

    def __init__(self, service: Service, records: QueueRecords, owner: str, clock: Callable[[], float] = time.time) -> None:
        self._service, self._records, self._owner, self._clock = service, records, owner, clock
        self._mine: dict[str, _Waiting] = {}
        self._heap: list[_Waiting] = []
        self._more = asyncio.Event()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="queue")
        self._stopping = False

    @property
    def waiting(self) -> int:
        """Requests that this server answers for and has not answered."""
        return len(self._mine)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work until the end; what is unfinished then stays in the storage."""
        workers = [asyncio.create_task(self._work()) for _ in range(self._service.settings.queue_width)]
        try:
            yield
        finally:
            self.stop()
            # The engine has finished or dropped what it had; what is left is delivery.
            _, late = await asyncio.wait(workers, timeout=_DELIVERY_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self._threads.shutdown(wait=True)

    def stop(self) -> None:
        """Begin no more requests."""
        self._stopping = True
        self._more.set()

    async def submit(self, request: QueuedRequest) -> int:
        """Accept a request; when this returns it is on the disk.

        Returns:
            How many requests are before it.

        Raises:
            Refusal: 429 where the queue is full, 503 while the server is ending.
            OutputError: it cannot be kept.
        """
        if self._stopping:
            raise Refusal(503, "The server is ending.", retry_after_s=_RETRY_S)
        most = self._service.settings.max_waiting
        if len(self._mine) >= most:
            raise Refusal(429, "The queue is full.", errors=[f"it holds {most} requests"], retry_after_s=10)
        waiting = _Waiting(-request.priority, request.id, request.key, request.model)
        self._mine[request.id] = waiting  # Counted before it is written, so that the bound holds meanwhile.
        try:
            await self._call(self._records.accept, request, self._owner)
        except BaseException:
            del self._mine[request.id]
            raise
        self._enqueue(waiting)
        return self._position(waiting)

    async def view(self, identifier: str, key: str, model: str) -> QueueView | None:
        """Where a request of this caller stands; None where it has none of that name."""
        mine = self._mine.get(identifier)
        if mine is not None:
            state = QueueState(key=mine.key, model=mine.model, owner=self._owner)
            found = state.model_copy(update={"status": "IN_PROGRESS"}) if mine.running else state
            view = QueueView(found, None if mine.running else self._position(mine))
        else:
            stored = await self._call(self._records.state, identifier)
            if stored is None:
                return None
            view = QueueView(stored, 0 if stored.status == "IN_QUEUE" else None)
        return view if view.state.key == key and view.state.model == model else None

    async def answer(self, identifier: str) -> bytes | None:
        """The body of the answer to a completed request; None where it has expired."""
        return await self._call(self._records.result, identifier)

    async def cancel(self, identifier: str, key: str, model: str) -> Literal["requested", "completed"] | None:
        """Cancel a request of this caller; None where there is none of that name."""
        view = await self.view(identifier, key, model)
        if view is None:
            return None
        if view.state.status == "COMPLETED":
            return "completed"
        mine = self._mine.get(identifier)
        if mine is None:
            await self._call(self._records.ask_to_cancel, identifier)
        else:
            await self._cancel(mine)
        return "requested"

    async def _cancel(self, waiting: _Waiting) -> None:
        waiting.cancelled = True
        if waiting.running is None:
            await self._finish_refused(waiting, _cancelled())
        elif not waiting.finishing:
            waiting.running.cancel()

    def take_up(self, request: QueuedRequest) -> None:
        """Answer for a request that is in the storage already."""
        waiting = _Waiting(-request.priority, request.id, request.key, request.model)
        self._mine[request.id] = waiting
        self._enqueue(waiting)

    def has(self, identifier: str) -> bool:
        """Whether this server answers for a request."""
        return identifier in self._mine

    async def cancel_mine(self, identifier: str) -> None:
        """Cancel a request that this server answers for, if it has not been."""
        mine = self._mine.get(identifier)
        if mine is not None and not mine.cancelled:
            await self._cancel(mine)

    def _enqueue(self, waiting: _Waiting) -> None:
        heapq.heappush(self._heap, waiting)
        self._more.set()

    def _position(self, waiting: _Waiting) -> int:
        return sum(1 for other in self._heap if not other.cancelled and other < waiting)

    async def _work(self) -> None:
        """One of the few that take the next request, again and again."""
        while True:
            while not self._heap and not self._stopping:
                self._more.clear()
                await self._more.wait()
            if self._stopping:
                return
            waiting = heapq.heappop(self._heap)
            if waiting.cancelled:
                continue
            waiting.running = asyncio.create_task(self._answer(waiting))
            try:
                await waiting.running
            except asyncio.CancelledError:
                if not waiting.cancelled:
                    waiting.running.cancel()
                    raise  # The server is ending; the request stays in the storage.
                await self._finish_refused(waiting, _cancelled())
            except Exception as error:
                # It stays in the storage, and is taken up again when the storage or the server is back.
                logger.error("queue request %s was put back: %s", waiting.id, error, exc_info=error)
                self._mine.pop(waiting.id, None)

    async def _answer(self, waiting: _Waiting) -> None:
        request = await self._call(self._records.request, waiting.id)
        if request is None:
            self._mine.pop(waiting.id, None)
            return
        began = QueueState(key=request.key, model=request.model, owner=self._owner, status="IN_PROGRESS")
        await self._call(self._records.put_state, waiting.id, began)
        for attempt in range(_MOST_TRIES):
            try:
                await self._generate(waiting, request)
                return
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  refusal_of logs what nobody foresaw
                refusal = refusal_of(error)
                if refusal.status != 503 or attempt == _MOST_TRIES - 1:
                    await self._finish_refused(waiting, refusal)
                    return
                await asyncio.sleep(_RETRY_S)

    async def _generate(self, waiting: _Waiting, request: QueuedRequest) -> None:
        service, began = self._service, time.perf_counter()
        call = fal_call(request.fields, service.request_type)
        wanted = engine_request(call.request, service.config)
        while True:
            await self._wait_until_ready()
            if request.start_by is not None and self._clock() > request.start_by:
                raise Refusal(504, "The request was not begun in the time that it was given.")
            try:
                result = await service.state.ready().generate(
                    wanted, priority=request.priority, timeout_s=service.settings.bounds.deadline_s
                )
                break
            except QueueFullError as error:
                await asyncio.sleep(max(0.1, error.retry_after_s))
        body = await service.deliver(call, result, request.base_url)
        await self._finish(waiting, 200, body, None, time.perf_counter() - began)

    async def _wait_until_ready(self) -> None:
        while self._service.state.phase != "ready":
            await asyncio.sleep(0.2)

    async def _finish_refused(self, waiting: _Waiting, refusal: Refusal) -> None:
        path = f"/queue/{waiting.model}/requests/{waiting.id}"
        message = "; ".join((refusal.message, *refusal.errors))
        await self._finish(waiting, refusal.status, refusal.body(path, waiting.id), message, None)

    async def _finish(self, waiting: _Waiting, status: int, body: bytes, error: str | None, seconds: float | None) -> None:
        state = QueueState(
            key=waiting.key,
            model=waiting.model,
            owner=self._owner,
            status="COMPLETED",
            status_code=status,
            error=error,
            seconds=seconds,
            expires=self._clock() + self._service.settings.expiry_s,
        )
        waiting.finishing = True
        await self._call(self._records.finish, waiting.id, state, body)
        self._mine.pop(waiting.id, None)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Something of the storage, in a thread."""
        return await in_thread(self._threads, function, *args, **kwargs)


def _cancelled() -> Refusal:
    return Refusal(400, "The request was cancelled.")
