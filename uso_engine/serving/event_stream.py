"""Server-sent events: what happens to a request while it runs, and the answer as the last of them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from uso_engine.api.events import Conditioning, Decoding, Done, Event, Queued, Stepped

if TYPE_CHECKING:
    from PIL.Image import Image

MEDIA_TYPE = "text/event-stream"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
BEAT = b": waiting\n\n"
"""A comment, which keeps proxies from taking silence for an end."""
BEAT_EVERY_S = 10.0
_PREVIEW_QUALITY = 80


class EventResponse(Response):
    """Events as an answer. When the client leaves, or the server ends, they are closed before the answer is.

    Args:
        events: encoded ones.
        held: what the request holds; closed when the answer has ended, whether or not the first event was ever asked for. The
            events' own ``finally`` is no place for that: closing a generator that has not begun runs none of it.
        telling: called before each event is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: AsyncExitStack | None = None,
        telling: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(headers=_HEADERS, media_type=MEDIA_TYPE)
        del self.headers["content-length"]
        self._events, self._held, self._telling = events, held or AsyncExitStack(), telling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_while_connected(receive, send)

    async def _send_while_connected(self, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            sending.result()
        finally:
            for one in (sending, gone):
                one.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async for event in self._events:
            if self._telling is not None:
                self._telling()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encoded(name: str, data: str) -> bytes:
    """One event; the data is JSON, which has no line breaks of its own."""
    return f"event: {name}\ndata: {data}\n\n".encode()


def described(event: Event) -> bytes:
    """An event of the engine, but for `Done`, whose answer the caller writes."""
    name, data = _named(event)
    return encoded(name, json.dumps(data))


def _named(event: Event) -> tuple[str, Mapping[str, object]]:
    if isinstance(event, Queued):
        return "queued", {"position": event.position}
    if isinstance(event, Conditioning):
        return "conditioning", {}
    if isinstance(event, Stepped):
        step: dict[str, object] = {"index": event.index, "steps": event.steps}
        return "step", step if event.preview is None else {**step, "preview": _as_data_uri(event.preview)}
    if isinstance(event, Decoding):
        return "decoding", {}
    assert not isinstance(event, Done)
    raise TypeError(f"expected an event of the engine, got {type(event).__name__}")


def _as_data_uri(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_PREVIEW_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


async def with_beats(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same events, with a comment wherever nothing comes for a while; closing it closes them."""
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({following}, timeout=BEAT_EVERY_S)
            if not done:
                yield BEAT
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            finally:
                following = None
            yield event
    finally:
        try:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        finally:  # A second cancellation interrupts the wait, but only when it is over.
            await events.aclose()
