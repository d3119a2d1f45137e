"""The outermost layer: gives each request an identifier, answers what nobody caught, writes one log line, counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusal import CLIENT_GONE, Refusal, refusal_of
from .request_record import RequestRecord, begin_record

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
        self._app, self._observe = app, observe

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
        except ClientDisconnect:
            record.status, record.outcome = CLIENT_GONE, "cancelled"
        except Exception as error:
            refusal = refusal_of(error)
            if record.status is not None:  # The answer has begun: only breaking it off says that it is not whole.
                record.outcome = "broken_off"
                raise
            await answer_refusal(refusal, scope, send_marked, record)
        finally:
            self._note(scope, record)

    def _note(self, scope: Scope, record: RequestRecord) -> None:
        record.outcome = record.outcome or outcome_of(record.status)
        self._observe(record)
        fields = {
            "request_id": record.request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": record.status,
            "outcome": record.outcome,
            "seconds": round(record.seconds, 4),
            "dialect": record.dialect,
            "caller": record.caller,
            "client": (scope.get("client") or ("",))[0],
            **record.details,
        }
        logger.info("request", extra={"fields": {name: value for name, value in fields.items() if value not in ("", None)}})


async def answer_refusal(refusal: Refusal, scope: Scope, send: Send, record: RequestRecord) -> None:
    """Send a refusal outside the routes."""
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
