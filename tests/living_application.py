"""The server's application without a process: its life, and a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from served_double import DoubleEngine

from uso_engine.config import EngineConfig, load_config
from uso_engine.serving.app import Application, make_application
from uso_engine.serving.auth import KeyRing
from uso_engine.serving.engine_state import OpenEngine
from uso_engine.serving.settings import ServerSettings
from uso_engine.serving.storage import open_storage

PATH = "/v1/images/generations"
BODY = {"model": "bytedance/uso", "prompt": "", "image_urls": [], "image_size": {"width": 64, "height": 64}, "seed": 1}
Ask = Callable[[httpx.AsyncClient], Awaitable[None]]


@asynccontextmanager
async def living(application: Application) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that has started and will end."""
    told: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    said: asyncio.Queue[Any] = asyncio.Queue()

    async def live() -> None:
        await application.asgi({"type": "lifespan", "state": {}}, told.get, said.put)

    life = asyncio.create_task(live())
    told.put_nowait({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    transport = httpx.ASGITransport(application.asgi, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        try:
            yield client
        finally:
            told.put_nowait({"type": "lifespan.shutdown"})
            await life


def application(
    folder: Path,
    settings: ServerSettings | None = None,
    *,
    config: EngineConfig | None = None,
    opened: OpenEngine | None = None,
    keys: KeyRing | None = None,
) -> Application:
    loaded = config or load_config("uso-tiny")

    @asynccontextmanager
    async def at_once() -> AsyncIterator[DoubleEngine]:
        yield DoubleEngine(loaded)

    return make_application(
        loaded, settings or ServerSettings(page=False), opened or at_once, open_storage(folder.as_uri()), keys
    )


def ask(made: Application, asked: Ask) -> None:
    async def run() -> None:
        async with living(made) as client, asyncio.timeout(60):
            while made.state.phase == "loading":
                await asyncio.sleep(0)
            await asked(client)

    asyncio.run(run())
