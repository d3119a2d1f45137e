"""Bounds on what a client sends and on how slowly it sends and reads: size, bodies held at once, time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusal import Refusal
from .settings import Transport

_CHUNK = 256 * 1024
# What follows a refused body on the same connection cannot be told from it.
_CLOSE = {"Connection": "close"}


class SlowReaderError(Exception):
    """A client took nothing of an answer for so long that it is not waited for.

    Args:
        waited_s: seconds that it had.
        sent_bytes: of the answer's body that had been written before.
    """

    def __init__(self, waited_s: float, sent_bytes: int) -> None:
        super().__init__(f"the client took nothing for {waited_s:g} s, after {sent_bytes} bytes")
        self.waited_s, self.sent_bytes = waited_s, sent_bytes


class BodyLimit:
    """Counts every request's body as it comes in, and lets no client hold an answer for ever.

    Args:
        app: what answers.
        bounds: the bounds.
        clock: seconds that only grow.
    """

    def __init__(self, app: ASGIApp, bounds: Transport, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._bounds, self._clock = app, bounds, clock
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _check_framing(scope)
        body = _Body(self, receive, self._announced(scope))
        try:
            await self._app(scope, body.receive, self._slow_reader_bound(send))
        finally:
            self.held_bytes -= body.counted

    def hold(self, count: int) -> None:
        """Count bytes that a request holds from now on.

        Raises:
            Refusal: 503 where all requests together hold too much.
        """
        if self.held_bytes + count > self._bounds.max_held_bytes:
            raise Refusal(503, "The server holds too much of other requests.", headers=_CLOSE, retry_after_s=1)
        self.held_bytes += count

    @property
    def bounds(self) -> Transport:
        """The bounds."""
        return self._bounds

    def now(self) -> float:
        """Seconds that only grow."""
        return self._clock()

    def _announced(self, scope: Scope) -> int:
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        announced = int(length) if length.isdigit() and len(length) < 20 else 0
        if announced > self._bounds.max_body_bytes:
            raise self.too_large(announced)
        return announced

    def too_large(self, count: int) -> Refusal:
        """The answer to a body of more bytes than are taken."""
        most = self._bounds.max_body_bytes
        return Refusal(413, "The body is too large.", errors=[f"at most {most} bytes are taken, got {count}"], headers=_CLOSE)

    def _slow_reader_bound(self, send: Send) -> Send:
        sent_bytes = 0

        async def sent(message: Message) -> None:
            nonlocal sent_bytes
            waiting = asyncio.timeout(self._bounds.idle_timeout_s)
            try:
                async with waiting:
                    await send(message)
            except TimeoutError:
                if not waiting.expired():
                    raise
                raise SlowReaderError(self._bounds.idle_timeout_s, sent_bytes) from None
            sent_bytes += len(message.get("body", b""))

        async def bounded(message: Message) -> None:
            body = message.get("body", b"") if message["type"] == "http.response.body" else b""
            if len(body) <= _CHUNK:
                await sent(message)
                return
            # In pieces, so that a client that reads nothing is noticed before all of it lies in the socket's buffer.
            more = message.get("more_body", False)
            for start in range(0, len(body), _CHUNK):
                last = start + _CHUNK >= len(body)
                piece = {"type": "http.response.body", "body": body[start : start + _CHUNK], "more_body": more or not last}
                await sent(piece)

        return bounded


class _Body:
    """One request's body, as it is received."""

    def __init__(self, limit: BodyLimit, receive: Receive, announced: int) -> None:
        self._limit, self._receive = limit, receive
        self.counted = self._seen = 0
        self._complete = False
        self._deadline = limit.now() + limit.bounds.body_timeout_s
        if announced:
            limit.hold(announced)
            self.counted = announced

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # From now on only the client's leaving is told.
        bounds = self._limit.bounds
        left = min(bounds.idle_timeout_s, self._deadline - self._limit.now())
        if left <= 0:  # What lies here already would be given without a wait, and a limit of none ends only a wait.
            raise _late()
        try:
            async with asyncio.timeout(left):
                message = await self._receive()
        except TimeoutError:
            raise _late() from None
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            self._complete = not message.get("more_body", False)
        return message

    def _count(self, length: int) -> None:
        self._seen += length
        if self._seen > self._limit.bounds.max_body_bytes:
            raise self._limit.too_large(self._seen)
        if self._seen > self.counted:
            self._limit.hold(self._seen - self.counted)
            self.counted = self._seen


def _check_framing(scope: Scope) -> None:
    """A proxy may go by the other one of two lengths: what follows would be smuggled past it."""
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise Refusal(400, "The request has both a Content-Length and a Transfer-Encoding.", headers=_CLOSE)


def _late() -> Refusal:
    return Refusal(408, "The body did not come in time.", headers=_CLOSE)
