"""Which names and pages may reach the server: the Host header against DNS rebinding, Origin against other sites' pages."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from .refusal import Refusal
from .settings import ServerSettings, is_loopback

_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::\d{1,5})?")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def accepted_hosts(settings: ServerSettings) -> frozenset[str] | None:
    """Names that the Host header may have; None where the operator leaves that to a proxy."""
    if is_loopback(settings.host):
        bound = f"[{settings.host}]" if ":" in settings.host else settings.host
        return frozenset(name.lower() for name in (*_LOOPBACK_NAMES, bound, *settings.allowed_hosts))
    return frozenset(name.lower() for name in settings.allowed_hosts) or None


class HostCheck:
    """Refuses foreign Host headers, and changes that another site's page asks for.

    A page of another site may send a form or a file here without asking, with no key where none is needed; its browser says
    so in Origin. Such requests are refused unless the origin is this server's own or one that CORS allows.

    Args:
        app: what answers.
        settings: names and origins.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._hosts = accepted_hosts(settings)
        self._origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = scope["headers"]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise Refusal(400, "The Host header is missing or malformed.")
        if self._hosts is not None and match[1].lower() not in self._hosts:
            raise Refusal(421, "This server does not answer to that Host header.", errors=["the operator allows hosts by name"])
        if scope["method"] in _SAFE_METHODS:
            return
        for name, value in headers:
            if name == b"origin":
                origin = value.decode("latin-1")
                own = origin.partition("://")[2] == hosts[0]
                if not own and origin not in self._origins:
                    raise Refusal(403, "Pages of other origins may not send requests here.")
