"""Running a call: admission, the engine, delivery; as one answer or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from uso_engine.api.events import Done, Event
from uso_engine.api.request import GenerationRequest
from uso_engine.api.result import GenerationResult
from uso_engine.config import EngineConfig
from uso_engine.imaging.encode import Encoder

from . import event_stream
from .auth import Key
from .delivery import Delivery, ImageAnswer
from .engine_state import EngineState
from .files import ImageFiles
from .image_call import ImageCall
from .in_thread import in_thread
from .metrics import Metrics
from .places import Places
from .rate_limit import CallerLimits
from .refusal import refusal_of
from .request_record import record_of
from .settings import ServerSettings
from .tracing import GenerationSpan, generation_span
from .wire_request import engine_request, wire_request

T = TypeVar("T")
_THREADS = 8


class Service:
    """What the routes of all dialects share.

    Args:
        config: of the engine, known before it is loaded.
        settings: of the server.
        state: the engine.
        files: where images go.
        metrics: what is counted.
    """

    def __init__(
        self, config: EngineConfig, settings: ServerSettings, state: EngineState, files: ImageFiles, metrics: Metrics
    ) -> None:
        self.config, self.settings, self.state, self.files, self.metrics = config, settings, state, files, metrics
        self.request_type: type[GenerationRequest] = wire_request(config, settings.bounds)
        self.limits = CallerLimits(settings.requests_per_minute, settings.concurrent)
        self._places = Places(settings.queue_width)
        self._encoder = Encoder()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="deliver")

    def close(self) -> None:
        """Finish what is being delivered."""
        self._threads.shutdown(wait=True)
        self._encoder.close()

    def base_url(self, request: Request) -> str:
        """What the client calls this server."""
        if self.settings.public_url is not None:
            return self.settings.public_url.rstrip("/")
        return f"{request.url.scheme}://{request.headers['host']}"

    def note(self, request: Request, key: Key, call: ImageCall) -> None:
        """Say in the request's log line what is asked for."""
        record = record_of(request.scope)
        record.dialect, record.caller = call.dialect, key.name
        record.details |= call.log_fields(with_prompt=self.settings.log_prompts)

    async def answer(self, request: Request, key: Key, call: ImageCall) -> Response:
        """The images of a call, as one answer.

        Raises:
            Refusal, and what `refusal_of` makes one of.
            ClientDisconnect: the client has gone; its request was cancelled.
        """
        self.note(request, key, call)
        wanted = engine_request(call.request, self.config)
        engine = self.state.ready()
        delivery = Delivery(self.files, self.base_url(request))
        with self._places.taken(engine.places), self.limits.running(key), self._span(request, call) as span:
            work = engine.generate(wanted, timeout_s=self.settings.bounds.deadline_s)
            result = await while_connected(request, work)
            span.done(result)
            body = await self.deliver(call, result, delivery)
        self._note_result(request, result)
        return ImageAnswer(body, call.status, delivery)

    async def stream(self, request: Request, key: Key, call: ImageCall, *, previews: bool) -> Response:
        """What happens to a call, as server-sent events; a call that is refused at once is an answer of its own.

        Raises:
            As `answer`.
        """
        self.note(request, key, call)
        wanted = engine_request(call.request, self.config)
        engine = self.state.ready()
        async with AsyncExitStack() as stack:
            stack.enter_context(self._places.taken(engine.places))
            stack.enter_context(self.limits.running(key))
            span = stack.enter_context(self._span(request, call))
            events = engine.stream(wanted, previews=previews, timeout_s=self.settings.bounds.deadline_s)
            stack.push_async_callback(events.aclose)
            # Whatever refuses it at once does so here, while the answer may still have another status.
            first = await while_connected(request, _first(events))
            held = stack.pop_all()
        delivery = Delivery(self.files, self.base_url(request))
        held.push_async_callback(delivery.withdraw)
        told = self._told(request, call, first, events, span, delivery)
        return event_stream.EventResponse(event_stream.with_beats(told), held, delivery.tell)

    async def deliver(self, call: ImageCall, result: GenerationResult, delivery: Delivery) -> bytes:
        """Encode and store the images and write the answer, in a thread. Without an answer no image stays stored.

        Raises:
            OutputError: an image could not be stored.
        """
        try:
            body = await in_thread(self._threads, call.rendered, result, delivery.store, self._encoder)
        except BaseException:  # Cancelled, too: whoever would be told of them is gone.
            await delivery.withdraw()
            raise
        delivery.complete()
        self.metrics.observe_result(result)
        return body

    async def find_file(self, name: str) -> tuple[bytes, str, float] | None:
        """A stored image, its media type and the seconds that it is kept; None where there is none."""
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self.files.find, name)
        return None if found is None else (found.data, found.content_type, found.seconds_left)

    async def _told(
        self,
        request: Request,
        call: ImageCall,
        first: Event,
        events: AsyncIterator[Event],
        span: GenerationSpan,
        delivery: Delivery,
    ) -> AsyncGenerator[bytes, None]:
        record = record_of(request.scope)
        try:
            event: Event | None = first
            while event is not None:
                if isinstance(event, Done):
                    span.done(event.result)
                    body = await self.deliver(call, event.result, delivery)
                    self._note_result(request, event.result)
                    yield event_stream.encoded("done", body.decode())
                    return
                yield event_stream.described(event)
                event = await anext(events, None)
        except (asyncio.CancelledError, GeneratorExit):
            record.outcome = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001  refusal_of logs what nobody foresaw
            refusal = refusal_of(error)
            span.failed(error)
            record.outcome = "failed" if refusal.status == 500 else "refused"
            record.details["error_status"] = refusal.status
            yield event_stream.encoded("error", refusal.body(request.url.path, record.request_id).decode())

    def _span(self, request: Request, call: ImageCall) -> AbstractContextManager[GenerationSpan]:
        return generation_span(call, record_of(request.scope).request_id, request.headers)

    def _note_result(self, request: Request, result: GenerationResult) -> None:
        details = record_of(request.scope).details
        details |= {"width": result.width, "height": result.height, "tokens": result.tokens_used}
        details["stages"] = {name: round(seconds, 4) for name, seconds in result.timings.items()}
        details["withheld"] = sum(result.has_nsfw_concepts)


async def _first(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """Wait for work, and cancel it if the client goes away first.

    Raises:
        ClientDisconnect: it has gone; the work has ended.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
