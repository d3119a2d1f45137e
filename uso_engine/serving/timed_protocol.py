"""uvicorn's HTTP/1.1 protocol with a time for headers, one for an end and a bound on connections, none of which it has."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .body_limit import SlowReaderError
from .settings import Transport


def timed_protocol(bounds: Transport) -> type[H11Protocol]:
    """The protocol class under these bounds."""

    class TimedProtocol(_EndingProtocol):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > bounds.max_connections:
                transport.abort()
                return
            self.transport = cast("asyncio.Transport", _EndingTransport(transport, self.loop, bounds.idle_timeout_s))
            self.app = cast("Any", self._ending(cast("ASGIApp", self.app)))
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """While headers are awaited the clock runs, however little at a time they come."""
            if self.conn.their_state is not h11.IDLE:
                self._unwatch()
            elif self._header_timer is None and self.timeout_keep_alive_task is None:
                self._header_timer = self.loop.call_later(bounds.header_timeout_s, self._too_slow)

        def _unwatch(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _too_slow(self) -> None:
            self._header_timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.abort()

    return TimedProtocol


class _EndingProtocol(H11Protocol):
    """uvicorn's, which leaves clients that do not read, and says nothing of what it cannot understand but once."""

    def timeout_keep_alive_handler(self) -> None:
        # Not close: what a client does not read would keep the connection for ever.
        if not self.transport.is_closing():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # What cannot be understood is the rest of a request that has been answered, or is being answered.
            self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # To no other protocol: the wish is ignored, as it may be, and the request answered.

    def _ending(self, application: ASGIApp) -> ASGIApp:
        """The application, whose answer ends with the connection where the client does not read it or the server ends now."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await application(scope, receive, send)
            except (SlowReaderError, asyncio.CancelledError):
                # It does not read, or the server ends. The request's log line says so; uvicorn would add a traceback.
                self.transport.abort()
                while (await receive())["type"] != "http.disconnect":
                    pass

        return answer


class _EndingTransport:
    """A transport whose end waits for a client that does not read for so long: asyncio's waits for ever.

    Args:
        transport: the real one.
        loop: it runs in.
        idle_timeout_s: seconds for what was written before the end.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, idle_timeout_s: float) -> None:
        self._transport, self._loop, self._idle_timeout_s = transport, loop, idle_timeout_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Write what is left, then end; end in any case when the time is over."""
        if not self._transport.is_closing():
            self._transport.close()
            self._loop.call_later(self._idle_timeout_s, self._transport.abort)
