"""The page at ``/``: the files of the folder ``page``, read once, with a policy that lets nothing in from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from .refusal import Refusal

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
# Images of an object store whose URLs are signed come by https.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob: https:; "
    "connect-src 'self' data: blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def page_folder() -> Path:
    """Where the page's files lie."""
    return Path(str(files("uso_engine.serving"))) / "page"


def page_router() -> APIRouter:
    """``/`` and ``/page/…``."""
    folder = page_folder()
    known = {
        path.relative_to(folder).as_posix(): (path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(folder.rglob("*"))
        if path.suffix in _TYPES
    }
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return _file("index.html")

    @router.get("/page/{name:path}")
    async def part(name: str) -> Response:
        return _file(name)

    def _file(name: str) -> Response:
        if name not in known:
            raise Refusal(404, "There is nothing at this path.")
        data, media_type = known[name]
        return Response(data, media_type=media_type, headers=_HEADERS)

    return router
