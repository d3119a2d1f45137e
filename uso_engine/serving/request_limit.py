"""A bound on requests at once, for servers whose connections somebody else bounds, or nobody."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from .refusal import Refusal

_RETRY_S = 2.0


class RequestLimit:
    """Refuses requests beyond so many that are being answered.

    With HTTP/1.1 a connection has one request at a time, so a process that bounds its connections never comes to it. Ray's
    proxies hand requests on, and hold what an ingress does not take for as long as they please.

    Args:
        app: what answers.
        most: requests at once, those whose events are followed among them.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self.running >= self._most:
            raise Refusal(
                429,
                "Too many requests at once.",
                errors=[f"{self.running} are being answered, which is as many as may be"],
                headers={"Connection": "close"},  # Its body is not read.
                retry_after_s=_RETRY_S,
            )
        self.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.running -= 1
