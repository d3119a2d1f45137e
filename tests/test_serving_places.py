"""Places of the engine between the durable queue and those who wait for an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from living_application import BODY, PATH, application, ask
from served_double import DoubleEngine

from uso_engine.config import load_config
from uso_engine.serving.settings import ServerSettings, Transport


def test_neither_the_queue_nor_those_who_wait_keep_the_others_out(tmp_path: Path) -> None:
    """The engine has eight places here, two of them for the queue: that is full of long requests, then the others are."""
    loaded = load_config("uso-tiny")
    config = loaded.model_copy(update={"queue": loaded.queue.model_copy(update={"max_requests": 8})})

    @asynccontextmanager
    async def opened() -> AsyncIterator[DoubleEngine]:
        yield DoubleEngine(config, most_at_once=8)

    made = application(tmp_path, ServerSettings(page=False, queue_width=2), config=config, opened=opened)

    async def asked(client: httpx.AsyncClient) -> None:
        engine = made.state.ready()
        assert isinstance(engine, DoubleEngine)

        async def running(count: int) -> None:
            while engine.running != count:
                await asyncio.sleep(0)

        for _ in range(9):
            assert (await client.post("/queue/fal-ai/uso", json={"prompt": "queued steps:100000"})).status_code == 200
        await running(2)
        # Nine are queued, and whoever waits is served.
        for path, body in ((PATH, BODY), ("/run/fal-ai/uso", {"prompt": "", "image_size": BODY["image_size"]})):
            assert (await client.post(path, json=body)).status_code in (200, 201)
        waited = [asyncio.create_task(client.post(PATH, json={**BODY, "prompt": "waited steps:100000"})) for _ in range(6)]
        await running(8)
        full = await client.post(PATH, json=BODY)
        assert (full.status_code, full.json()["errors"], full.headers["retry-after"]) == (
            429,
            ["6 are waited for, and 2 of 8 places are kept for the queue"],
            "2",
        )
        assert (await client.post(f"{PATH}?stream=true", json=BODY)).status_code == 429
        # As many as may wait do, and the queue goes on: its next one is begun when one of it has ended.
        begun = engine.begun.count("queued steps:100000")
        last = (await client.post("/queue/fal-ai/uso", json={"prompt": "last"})).json()
        for identifier in tuple(made.runner._mine):
            if identifier != last["request_id"]:
                await made.runner.cancel_mine(identifier)
        while (await client.get(last["response_url"].removeprefix("http://localhost"))).status_code != 200:
            await asyncio.sleep(0)
        assert begun == 2 and not any(task.done() for task in waited)
        for task in waited:
            task.cancel()
        await asyncio.gather(*waited, return_exceptions=True)
        await running(0)
        assert (await client.post(PATH, json=BODY)).status_code == 201

    ask(made, asked)


def test_places_come_and_go_with_replicas(tmp_path: Path) -> None:
    """Of an engine that is many: sixteen places where one has eight, then eight, four, and sixteen again."""
    loaded = load_config("uso-tiny")
    config = loaded.model_copy(update={"queue": loaded.queue.model_copy(update={"max_requests": 8})})

    @asynccontextmanager
    async def opened() -> AsyncIterator[DoubleEngine]:
        engine = DoubleEngine(config)
        engine.places = 16
        yield engine

    made = application(tmp_path, ServerSettings(page=False, queue_width=2), config=config, opened=opened)

    async def asked(client: httpx.AsyncClient) -> None:
        engine = made.state.ready()
        assert isinstance(engine, DoubleEngine)
        burst = [asyncio.create_task(client.post(PATH, json={**BODY, "prompt": "steps:100000"})) for _ in range(15)]
        (refused,), waiting = await asyncio.wait(burst, return_when=asyncio.FIRST_COMPLETED)
        assert refused.result().json()["errors"] == ["14 are waited for, and 2 of 16 places are kept for the queue"]
        while engine.running != 14:
            await asyncio.sleep(0)
        engine.places = 8
        assert (await client.post(PATH, json=BODY)).status_code == 429
        for task in list(waiting)[:10]:
            task.cancel()
        while engine.running != 4:
            await asyncio.sleep(0)
        assert (await client.post(PATH, json=BODY)).status_code == 201
        engine.places = 4
        assert (await client.post(PATH, json=BODY)).status_code == 429
        engine.places = 16
        assert (await client.post(PATH, json=BODY)).status_code == 201
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    ask(made, asked)


def test_more_requests_at_once_than_connections_are_refused(tmp_path: Path) -> None:
    """Ray hands on what it likes: there are no connections to count."""
    made = application(tmp_path, ServerSettings(page=False, transport=Transport(max_connections=2)))

    async def asked(client: httpx.AsyncClient) -> None:
        engine = made.state.ready()
        assert isinstance(engine, DoubleEngine)
        held = [asyncio.create_task(client.post(PATH, json={**BODY, "prompt": "steps:100000"})) for _ in range(2)]
        while engine.running != 2:
            await asyncio.sleep(0)
        for path in ("/healthz", "/v1/models"):
            full = await client.get(path)
            assert (full.status_code, full.json()["message"], full.headers["retry-after"], full.headers["connection"]) == (
                429,
                "Too many requests at once.",
                "2",
                "close",
            )
        assert full.json()["errors"] == ["2 are being answered, which is as many as may be"]
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert (await client.get("/healthz")).status_code == 200

    ask(made, asked)
