"""What an operator sets and sees: phases of the engine, limits of keys, addresses, origins, safety, logs; without a process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_double import DoubleEngine
from serving_process import HTTP, double_server, serving

from uso_engine.config import EngineConfig, load_config, parse_config
from uso_engine.errors import ConfigError
from uso_engine.request_type import request_type_of
from uso_engine.serving.app import Application, make_application
from uso_engine.serving.auth import KeyRing
from uso_engine.serving.engine_state import OpenEngine
from uso_engine.serving.settings import RequestBounds, ServerSettings
from uso_engine.serving.storage import open_storage
from uso_engine.serving.wire_request import engine_request, wire_request

PATH = "/v1/images/generations"
BODY = {"model": "bytedance/uso", "prompt": "", "image_urls": [], "image_size": {"width": 64, "height": 64}, "seed": 1}
ALICE = {"Authorization": "Bearer alice-has-this-key"}
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


def test_phases_of_the_engine(tmp_path: Path) -> None:
    loaded, leave = asyncio.Event(), []

    @asynccontextmanager
    async def slowly() -> AsyncIterator[DoubleEngine]:
        await loaded.wait()
        yield DoubleEngine(load_config("uso-tiny"))
        leave.append("closed")

    made = application(tmp_path, opened=slowly)

    async def run() -> None:
        async with living(made) as client:
            for call in (client.get("/readyz"), client.post(PATH, json=BODY)):
                answer = await call
                assert (answer.status_code, answer.json()["errors"], answer.headers["retry-after"]) == (
                    503,
                    ["it is loading"],
                    "10",
                )
            assert (await client.get("/healthz")).status_code == 200
            assert "uso_ready 0.0" in (await client.get("/metrics")).text
            loaded.set()
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0)
            assert (await client.post(PATH, json=BODY)).status_code == 201
            dead = await client.post(PATH, json={**BODY, "prompt": "die"})
            assert (dead.status_code, dead.json()["errors"]) == (503, ["it has failed"])
            assert (await client.get("/readyz")).json()["errors"] == ["it is failed"]
            assert (await client.get("/healthz")).status_code == 200

    asyncio.run(run())
    assert leave == ["closed"]


def test_draining_takes_no_more_and_finishes(tmp_path: Path) -> None:
    made = application(tmp_path)

    async def asked(client: httpx.AsyncClient) -> None:
        running = asyncio.create_task(client.post(PATH, json={**BODY, "prompt": "steps:10"}))
        engine = made.state.ready()
        assert isinstance(engine, DoubleEngine)
        while engine.running == 0:
            await asyncio.sleep(0)
        made.runner.stop()
        draining = asyncio.create_task(made.state.drain(30))
        await asyncio.sleep(0)
        for path, body in ((PATH, BODY), ("/queue/fal-ai/uso", {"prompt": ""})):
            answer = await client.post(path, json=body)
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert (await client.get("/readyz")).json()["errors"] == ["it is draining"]
        assert (await running).status_code == 201
        await draining

    ask(made, asked)


def test_limits_of_keys(tmp_path: Path) -> None:
    ring = KeyRing(None, "alice:alice-has-this-key,bob:bob-has-this-key!")
    settings = ServerSettings(has_keys=True, requests_per_minute=3, concurrent=1, page=False)
    made = application(tmp_path, settings, keys=ring)

    async def asked(client: httpx.AsyncClient) -> None:
        long = asyncio.create_task(client.post(PATH, json={**BODY, "prompt": "steps:30"}, headers=ALICE))
        engine = made.state.ready()
        assert isinstance(engine, DoubleEngine)
        while engine.running == 0:
            await asyncio.sleep(0)
        second = await client.post(PATH, json=BODY, headers=ALICE)
        assert (second.status_code, second.json()["message"]) == (429, "Too many requests at once.")
        assert (await client.post(PATH, json=BODY, headers={"Authorization": "Key bob-has-this-key!"})).status_code == 201
        assert (await long).status_code == 201
        ticket = (await client.post("/queue/fal-ai/uso", json={"prompt": ""}, headers=ALICE)).json()
        many = await client.post(PATH, json=BODY, headers=ALICE)
        assert (many.status_code, many.json()["message"], int(many.headers["retry-after"]) <= 20) == (
            429,
            "Too many requests.",
            True,
        )
        status = ticket["status_url"].removeprefix("http://localhost")
        assert (await client.get(status, headers=ALICE)).status_code in (200, 202)
        # Another key's request is none.
        assert (await client.get(status, headers={"Authorization": "Bearer bob-has-this-key!"})).status_code == 404
        assert (await client.get("/v1/models")).status_code == 401

    ask(made, asked)


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


def test_addresses_origins_and_names(tmp_path: Path) -> None:
    settings = ServerSettings(
        public_url="https://uso.example/api/",
        cors_origins=("https://pages.example",),
        allowed_hosts=("uso.example",),
        aliases=("tiny", "me/tiny"),
        page=False,
    )

    async def asked(client: httpx.AsyncClient) -> None:
        origin = {"origin": "https://pages.example"}
        answer = await client.post(PATH, json=BODY, headers={**origin, "host": "uso.example"})
        assert answer.headers["access-control-allow-origin"] == "https://pages.example"
        assert answer.json()["images"][0]["url"].startswith("https://uso.example/api/files/")
        wanted = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert (await client.options(PATH, headers=wanted)).status_code == 200
        foreign = await client.options(PATH, headers={**wanted, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers
        assert (await client.post("/queue/me/tiny", json={"prompt": ""})).status_code == 200
        assert (await client.post(PATH, json={"prompt": "", "model": "tiny", "image_urls": []})).status_code == 200
        assert (await client.get("/")).status_code == 404

    ask(application(tmp_path, settings), asked)


def test_the_page_comes_with_a_policy(tmp_path: Path) -> None:
    async def asked(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        script = await client.get("/page/main.js")
        assert (script.status_code, script.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
        for name in ("/page/../service.py", "/page/%2e%2e/service.py", "/page/nothing.js"):
            assert (await client.get(name)).status_code == 404

    ask(application(tmp_path, ServerSettings()), asked)


def configured(**safety: object) -> EngineConfig:
    table = load_config("uso-tiny").model_dump(exclude={"safety"})
    return parse_config({**table, **({"safety": {"folder": "x", **safety}} if safety else {})})


def test_the_safety_checker_is_the_operators(tmp_path: Path) -> None:
    async def forbidden(client: httpx.AsyncClient) -> None:
        off = await client.post(PATH, json={**BODY, "enable_safety_checker": False})
        assert (off.status_code, off.json()["fields"]) == (400, ["enable_safety_checker"])
        assert (await client.post(PATH, json=BODY)).status_code == 201

    async def missing(client: httpx.AsyncClient) -> None:
        on = await client.post(PATH, json=BODY)
        assert (on.status_code, "has no safety checker" in on.json()["errors"][0]) == (400, True)
        assert (await client.post(PATH, json={**BODY, "enable_safety_checker": False})).status_code == 201

    ask(application(tmp_path, config=configured(forbid_disabling=True)), forbidden)
    ask(application(tmp_path, config=configured()), missing)


def test_limits_that_the_configurations_defaults_break(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uso-tiny: its defaults do not fit the server's limits"):
        wire_request(load_config("uso-tiny"), RequestBounds(max_pixels=4096))
    kind = wire_request(load_config("uso-tiny"), RequestBounds(max_steps=5))
    request = kind.model_validate({"model": "bytedance/uso", "prompt": "", "image_urls": []})
    config = load_config("uso-tiny")
    # The engine's own default is 28.
    assert engine_request(request, config).fitted_to(request_type_of(config)).num_inference_steps == 5


@pytest.fixture
def request_lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, object]]]:
    lines: list[dict[str, object]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.__dict__.get("fields", {}))

    handler = Kept()
    logger = logging.getLogger("uso_engine.serving.requests")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("shown", [False, True])
def test_prompts_are_logged_only_if_asked_for(tmp_path: Path, request_lines: list[dict[str, object]], shown: bool) -> None:
    async def asked(client: httpx.AsyncClient) -> None:
        await client.post(PATH, json={**BODY, "prompt": "hush"})

    ask(application(tmp_path, ServerSettings(log_prompts=shown, page=False)), asked)
    assert ("hush" in str(request_lines)) is shown and len(request_lines) == 1


def test_a_server_whose_engine_cannot_be_loaded_ends(tmp_path: Path) -> None:
    with serving(double_server(tmp_path, 0, "load_s=-1"), tmp_path / "log") as served:
        assert served.process.wait(60) == 1
        assert "the engine could not be loaded" in served.log.read_text()


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with serving(double_server(tmp_path, 0, "drain_s=1000.0"), tmp_path / "log") as served:
        ticket = HTTP.post(f"{served.url}/queue/fal-ai/uso", json={"prompt": "steps:100000"}).json()
        while HTTP.get(ticket["status_url"]).json()["status"] != "IN_PROGRESS":
            pass
        served.process.terminate()
        while HTTP.get(f"{served.url}/readyz").status_code != 503:
            pass
        assert served.end() == 0
    assert list((tmp_path / "storage" / "queue").glob("*.request.json"))
