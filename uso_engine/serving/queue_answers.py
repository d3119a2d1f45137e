"""Answers of the queue's requests: computed by the engine, kept in the storage, and then told.

A server that was held up for longer than its lease may find that another one has taken a request up: it lets go of what it has
of that, and the other's answer stands.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

from pydantic import ValidationError

from uso_engine.api.response import ErrorBody
from uso_engine.api.result import GenerationResult
from uso_engine.errors import OutputError, QueueFullError

from .delivery import Delivery
from .fal_answer import fal_call
from .image_call import ImageCall
from .in_thread import in_thread
from .queue_records import QueuedRequest, QueueRecords, QueueState
from .queue_waiting import WaitingRequest
from .refusal import Refusal, refusal_of
from .retry import tried
from .service import Service
from .wire_request import engine_request

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class QueueAnswers:
    """Makes the answers of one server's requests.

    Args:
        service: runs and delivers.
        records: the queue's files.
        threads: for calls of the storage.
        clock: seconds since 1970.

    Attributes:
        stopping: set when the server is ending: no engine is waited for any more.
    """

    def __init__(self, service: Service, records: QueueRecords, threads: Executor, clock: Callable[[], float]) -> None:
        self._service, self._records, self._threads, self._clock = service, records, threads, clock
        self.stopping = False

    async def compute(self, waiting: WaitingRequest) -> None:
        """Compute a request, and keep and tell its answer, or why there is none.

        Raises:
            OutputError: that could not be written; the request is in the storage still, and no image of it.
        """
        request = await self._begun(waiting)
        if request is None:
            return
        since = time.perf_counter()
        try:
            call = fal_call(request.fields, self._service.request_type)
            result = await tried(lambda: self._generated(call, request))
            await tried(lambda: self._deliver(waiting, call, result, request.base_url, since))
        except Exception as error:  # noqa: BLE001  refusal_of logs what nobody foresaw
            await self.refuse(waiting, refusal_of(error))

    async def refuse(self, waiting: WaitingRequest, refusal: Refusal) -> None:
        """Keep and tell that a request ended without images.

        Raises:
            OutputError: that could not be written; the request is in the storage still.
        """
        path = f"/queue/{waiting.state.model}/requests/{waiting.id}"
        message = _said(refusal.message, refusal.errors)
        waiting.finishing = True
        if await self._stored_state(waiting) is not None:
            over = self._over(waiting, refusal.status, message, None)
            await self._call(self._records.finish, waiting.id, over, refusal.body(path, waiting.id))

    async def _begun(self, waiting: WaitingRequest) -> QueuedRequest | None:
        """A request that is said to be in progress; None where it is not this server's any more, or is gone."""
        state = await self._stored_state(waiting)
        if state is None:
            return None
        request = await self._call(self._records.request, waiting.id)
        if request is None:
            if await self._is_answered(waiting):
                return None
            logger.error("queue request %s is not in the storage any more; nobody will answer it", waiting.id)
            if state is not waiting.state:  # Who follows it would wait for ever.
                await self.refuse(waiting, Refusal(500, "The request is not in the storage any more."))
            return None
        await self._call(self._records.put_state, waiting.id, waiting.state.model_copy(update={"status": "IN_PROGRESS"}))
        return request

    async def _is_answered(self, waiting: WaitingRequest) -> bool:
        """Whether the answer of a request that is gone is there; then that is said again.

        Another server, which was taken for dead, had told it in the moment in which this one took the request up.
        """
        body = await self._call(self._records.result, waiting.id)
        if body is None:
            return False
        logger.warning("queue request %s is let go of: its answer is there, and stands", waiting.id)
        try:
            failure = ErrorBody.model_validate_json(body)
            over = self._over(waiting, failure.statusCode, _said(failure.message, failure.errors), None)
        except ValidationError:  # Images.
            over = self._over(waiting, 200, None, None)
        await self._call(self._records.put_state, waiting.id, over)
        return True

    async def _stored_state(self, waiting: WaitingRequest) -> QueueState | None:
        """The state of a request that is still this server's to answer; None where another one has it, or it has its answer."""
        state = await self._call(self._records.state, waiting.id)
        if state is None:
            return waiting.state  # Gone, or never written: what is written now says it anew.
        if state.owner != waiting.state.owner or state.status == "COMPLETED":
            logger.warning("queue request %s is let go of: %s answers for it, which stands", waiting.id, state.owner)
            return None
        return state

    async def _generated(self, call: ImageCall, request: QueuedRequest) -> GenerationResult:
        """The images of a request, when the engine is ready and has room."""
        service = self._service
        wanted = engine_request(call.request, service.config)
        while True:
            await self._wait_until_ready()
            if request.start_by is not None and self._clock() > request.start_by:
                raise Refusal(504, "The request was not begun in the time that it was given.")
            try:
                return await service.state.ready().generate(
                    wanted, priority=request.priority, timeout_s=service.settings.bounds.deadline_s
                )
            except QueueFullError as error:
                await asyncio.sleep(max(0.1, error.retry_after_s))

    async def _wait_until_ready(self) -> None:
        while self._service.state.phase != "ready":
            if self.stopping:
                raise asyncio.CancelledError  # It never will be again: the request is left to the storage.
            await asyncio.sleep(0.2)

    async def _deliver(
        self, waiting: WaitingRequest, call: ImageCall, result: GenerationResult, base_url: str, since: float
    ) -> None:
        """Store the images, keep the answer and tell it. Images of an answer that nobody is told of do not stay.

        Raises:
            OutputError: something could not be stored; the request is in the storage still.
            Refusal: that, and the request was cancelled meanwhile.
        """
        delivery = Delivery(self._service.files, base_url)
        body = await self._service.deliver(call, result, delivery)
        over = self._over(waiting, 200, None, time.perf_counter() - since)
        try:
            if await self._stored_state(waiting) is None:
                await delivery.withdraw()
                return
            waiting.finishing = True
            await self._call(self._records.finish, waiting.id, over, body)
        except BaseException as error:  # Cancelled, too.
            told = waiting.finishing and await self._is_told(waiting.id, over)
            if told is False:
                await delivery.withdraw()
            if not isinstance(error, Exception):
                raise
            if told:
                logger.error("queue request %s is answered, and lies in the storage still: %s", waiting.id, error)
                return
            waiting.finishing = False
            if waiting.cancelled:
                raise cancelled() from None
            raise

    def _over(self, waiting: WaitingRequest, status: int, error: str | None, seconds: float | None) -> QueueState:
        return waiting.state.model_copy(
            update={
                "status": "COMPLETED",
                "status_code": status,
                "error": error,
                "seconds": seconds,
                "expires": self._clock() + self._service.settings.expiry_s,
            }
        )

    async def _is_told(self, identifier: str, state: QueueState) -> bool | None:
        """Whether a state that could not be written is there all the same: a store's answer can be lost on the way.

        Returns:
            None where that cannot be read: then somebody may know the images, and they are left to expire.
        """
        try:
            return await in_thread(None, self._records.state, identifier) == state
        except OutputError as error:
            logger.warning("images of queue request %s, which somebody may know, are left to expire: %s", identifier, error)
            return None

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Something of the storage, in a thread."""
        return await in_thread(self._threads, function, *args, **kwargs)


def _said(message: str, errors: Sequence[str]) -> str:
    return "; ".join((message, *errors))


def cancelled() -> Refusal:
    """What a request that was cancelled ends with."""
    return Refusal(400, "The request was cancelled.")
