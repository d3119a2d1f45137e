"""Working through fal's queue: a few requests at a time are given to the engine; the rest waits."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Literal, ParamSpec, TypeVar

from uso_engine.errors import OutputError

from .in_thread import in_thread
from .queue_answers import QueueAnswers, cancelled
from .queue_records import QueuedRequest, QueueRecords, Submission
from .queue_waiting import QueueView, WaitingRequest, waiting_of
from .refusal import Refusal
from .service import Service

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
_RETRY_S = 2.0
_DELIVERY_S = 10.0


class AlreadySubmittedError(Exception):
    """Another request of the same submission was accepted first."""


class QueueRunner:
    """The durable queue of one server.

    Args:
        service: runs and delivers.
        records: the queue's files.
        owner: what this server calls itself there.
        clock: seconds since 1970.

    Attributes:
        has_lease: whether others know that this server is alive. What it accepted without, they would take for a dead one's.
    """

    def __init__(self, service: Service, records: QueueRecords, owner: str, clock: Callable[[], float] = time.time) -> None:
        self._service, self._records, self._owner, self._clock = service, records, owner, clock
        self._mine: dict[str, WaitingRequest] = {}
        self._heap: list[WaitingRequest] = []
        self._more = asyncio.Event()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="queue")
        self._answers = QueueAnswers(service, records, self._threads, clock)
        self._stopping = False
        self.has_lease = True

    @property
    def waiting(self) -> int:
        """Requests that this server answers for and has not answered."""
        return len(self._mine)

    @property
    def takes_up(self) -> bool:
        """Whether this server takes up what others left: not while it ends, or without a living engine."""
        return not self._stopping and self._service.state.phase != "failed"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work until the end; what is unfinished then stays in the storage."""
        workers = [asyncio.create_task(self._work()) for _ in range(self._service.settings.queue_width)]
        try:
            yield
        finally:
            self.stop()
            try:
                # The engine has finished or dropped what it had; what is left is delivery.
                await asyncio.wait(workers, timeout=_DELIVERY_S)
            finally:
                await self._end(workers)

    async def _end(self, workers: list[asyncio.Task[None]]) -> None:
        for task in workers:
            task.cancel()
        ending = [waiting.ending for waiting in self._mine.values() if waiting.ending is not None]
        try:
            await asyncio.gather(*workers, *ending, return_exceptions=True)
        finally:  # A second cancellation interrupts the wait, but only when it is over.
            self._threads.shutdown(wait=True)

    def stop(self) -> None:
        """Begin no more requests."""
        self._stopping = self._answers.stopping = True
        self._more.set()

    async def submit(self, request: QueuedRequest) -> int:
        """Accept a request; when this returns it is on the disk.

        Returns:
            How many requests are before it.

        Raises:
            AlreadySubmittedError: another request of its submission was accepted at this moment.
            Refusal: 429 where the queue is full, 503 while the server is ending.
            OutputError: it cannot be kept.
        """
        if self._stopping:
            raise Refusal(503, "The server is ending.", retry_after_s=_RETRY_S)
        if not self.has_lease:
            raise OutputError("nothing is accepted before this server's lease is written")
        most = self._service.settings.max_waiting
        if len(self._mine) >= most:
            raise Refusal(429, "The queue is full.", errors=[f"it holds {most} requests"], retry_after_s=10)
        waiting = waiting_of(request, self._owner)
        self._mine[request.id] = waiting  # Counted before it is written, so that the bound holds meanwhile.
        try:
            accepted = await self._call(self._records.accept, request, self._owner)
        except BaseException:
            await self._withdraw(request)
            raise
        if not accepted:
            del self._mine[request.id]
            raise AlreadySubmittedError(request.id)
        self._enqueue(waiting)
        return self._position(waiting)

    async def _withdraw(self, request: QueuedRequest) -> None:
        """Remove what nobody was told of: taken up from the storage, it would be computed for nobody."""
        try:
            # Not in the queue's own threads: the server may be ending.
            if not await in_thread(None, self._records.withdraw, request):
                logger.info("queue request %s stays: its Idempotency-Key leads to it", request.id)
        except OutputError as error:
            logger.error("queue request %s could not be withdrawn: %s", request.id, error)
        finally:
            self._mine.pop(request.id, None)  # Sent again and cancelled meanwhile, it has been removed.

    async def submitted(self, submission: Submission) -> str | None:
        """The request that a submission became; None where it was not made, or its request has expired.

        Raises:
            Refusal: 422 where something else was submitted under its key.
            OutputError: the storage failed.
        """
        found = await self._call(self._records.submitted, submission.name)
        if found is None:
            return None
        if found.id not in self._mine and await self._call(self._records.state, found.id) is None:
            await self._call(self._records.forget, submission.name, found.id)
            return None
        if found.fingerprint != submission.fingerprint:
            raise Refusal(
                422,
                "The Idempotency-Key was used for another request.",
                errors=["the same key is for sending the same request again; a new request needs a new key"],
                fields=["Idempotency-Key"],
            )
        return found.id

    async def view(self, identifier: str, key: str, model: str) -> QueueView | None:
        """Where a request of this caller stands; None where it has none of that name."""
        mine = self._mine.get(identifier)
        if mine is not None:
            found = mine.state.model_copy(update={"status": "IN_PROGRESS"}) if mine.running else mine.state
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
        """Cancel a request of this caller; None where there is none of that name.

        Raises:
            OutputError: the wish cannot be kept; the request goes on.
        """
        view = await self.view(identifier, key, model)
        if view is None:
            return None
        if view.state.status == "COMPLETED":
            return "completed"
        # Kept before it is told: whoever takes the request up, where its end could not be written, ends it.
        await self._call(self._records.ask_to_cancel, identifier)
        mine = self._mine.get(identifier)
        if mine is not None:
            await self._cancel(mine)
        return "requested"

    async def _cancel(self, waiting: WaitingRequest) -> None:
        waiting.cancelled = True
        if waiting.running is None:
            self._dequeue(waiting)  # Left there, those of who submits and cancels in turn would be more than any bound.
            # A task of its own: whoever asks for it may be gone before it is written, and may ask twice.
            waiting.ending = waiting.ending or asyncio.create_task(self._end_unbegun(waiting))
            await asyncio.shield(waiting.ending)
        elif not waiting.finishing:
            waiting.running.cancel()

    async def _end_unbegun(self, waiting: WaitingRequest) -> None:
        try:
            await self._answers.refuse(waiting, cancelled())
        except Exception as error:  # noqa: BLE001  logged there; the wish is kept, and the upkeep ends it
            self._put_back(waiting, error)
        self._mine.pop(waiting.id, None)

    def _put_back(self, waiting: WaitingRequest, error: Exception) -> None:
        """Leave a request to the storage: it is taken up again when that, or the server, is back."""
        logger.error("queue request %s was put back: %s", waiting.id, error, exc_info=error)
        self._mine.pop(waiting.id, None)

    def take_up(self, request: QueuedRequest) -> None:
        """Answer for a request that is in the storage already; it is begun in a later turn of the loop."""
        waiting = waiting_of(request, self._owner)
        self._mine[request.id] = waiting
        self._enqueue(waiting)

    def has(self, identifier: str) -> bool:
        """Whether this server answers for a request."""
        return identifier in self._mine

    def unbegun(self) -> set[str]:
        """Identifiers of the requests that wait here."""
        return {waiting.id for waiting in self._heap}

    async def let_go_of_answered(self, identifier: str) -> None:
        """Let go of a request that waits here, if another server, which took this one for dead, has answered it.

        Raises:
            OutputError: the storage failed.
        """
        state = await self._call(self._records.state, identifier)
        mine = self._mine.get(identifier)
        if state is not None and state.status == "COMPLETED" and mine is not None and mine in self._heap:
            logger.warning("queue request %s is let go of: %s has answered it", identifier, state.owner)
            self._dequeue(mine)
            del self._mine[identifier]

    async def cancel_mine(self, identifier: str) -> None:
        """Cancel a request that this server answers for, if it has not been."""
        mine = self._mine.get(identifier)
        if mine is not None and not mine.cancelled:
            await self._cancel(mine)

    def _enqueue(self, waiting: WaitingRequest) -> None:
        heapq.heappush(self._heap, waiting)
        self._more.set()

    def _dequeue(self, waiting: WaitingRequest) -> None:
        if waiting in self._heap:
            self._heap.remove(waiting)
            heapq.heapify(self._heap)

    def _position(self, waiting: WaitingRequest) -> int:
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
            waiting.running = asyncio.create_task(self._answers.compute(waiting))
            try:
                await self._answered(waiting, waiting.running)
            except Exception as error:  # noqa: BLE001  logged there, and nothing may end the worker
                self._put_back(waiting, error)

    async def _answered(self, waiting: WaitingRequest, running: asyncio.Task[None]) -> None:
        try:
            await running
        except (asyncio.CancelledError, Exception):
            if not waiting.cancelled:
                raise  # The server is ending, or the storage failed: the request stays there.
            await self._answers.refuse(waiting, cancelled())
        self._mine.pop(waiting.id, None)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Something of the storage, in a thread."""
        return await in_thread(self._threads, function, *args, **kwargs)
