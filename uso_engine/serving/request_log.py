"""The outermost layers: an identifier for each request, an answer to every exception, one log line, one count."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .body_limit import SlowReaderError
from .refusal import CLIENT_GONE, Refusal, refusal_of
from .request_record import RequestRecord, begin_record, record_of

logger = logging.getLogger("uso_engine.serving.requests")

_SECURITY = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
Observer = Callable[[RequestRecord], None]


class RequestLog:
    """One line and one count for each request.

    Args:
        app: what answers.
        observe: told of each request that has ended.
    """

    def __init__(self, app: ASGIApp, observe: Observer) -> None:
        self._app, self._observe = RefusalAnswers(app), observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = begin_record(scope)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", record.request_id.encode()),
                    *_SECURITY,
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except asyncio.CancelledError:
            record.outcome = "cancelled"
            raise
        except SlowReaderError as slow:
            record.outcome = "unread"
            record.details |= {"waited_s": slow.waited_s, "sent_bytes": slow.sent_bytes}
            raise
        finally:
            self._note(scope, record)

    def _note(self, scope: Scope, record: RequestRecord) -> None:
        record.outcome = record.outcome or outcome_of(record.status)
        self._observe(record)
        fields = {
            "request_id": record.request_id,
            "method": scope["method"],
            "path": _path(scope),
            "status": record.status,
            "outcome": record.outcome,
            "seconds": round(record.seconds, 4),
            "dialect": record.dialect,
            "caller": record.caller,
            "client": (scope.get("client") or ("",))[0],
            **record.details,
        }
        logger.info("request", extra={"fields": {name: value for name, value in fields.items() if value not in ("", None)}})


def _path(scope: Scope) -> str:
    """The route's pattern: the names of stored images are secrets. Of what no route takes, the path."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or scope["path"][:200]


class RefusalAnswers:
    """Answers every exception. It stands outside the layers, and within those that would answer one in their own words.

    Args:
        app: what may raise.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            record.status, record.outcome = CLIENT_GONE, "cancelled"
        except Exception as error:
            if record.status is not None:  # The answer has begun: only breaking it off says that it is not whole.
                record.outcome = "broken_off"
                raise
            await _answer_refusal(refusal_of(error), scope, send, record)


async def _answer_refusal(refusal: Refusal, scope: Scope, send: Send, record: RequestRecord) -> None:
    body = refusal.body(scope["path"], record.request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def outcome_of(status: int | None) -> str:
    """An answer's status as a word for metrics."""
    if status is None or status == CLIENT_GONE:
        return "cancelled"
    if status < 400:
        return "ok"
    named = {401: "unauthorized", 429: "busy", 503: "unavailable", 504: "timed_out"}
    return named.get(status, "refused" if status < 500 else "failed")
