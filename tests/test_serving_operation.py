"""What an operator sets and sees: phases of the engine, limits of keys, addresses, origins, safety, logs; without a process."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from living_application import BODY, PATH, application, ask, living
from served_double import DoubleEngine
from serving_process import HTTP, double_server, serving

from uso_engine.config import EngineConfig, load_config, parse_config
from uso_engine.errors import ConfigError
from uso_engine.request_type import request_type_of
from uso_engine.serving.auth import KeyRing
from uso_engine.serving.settings import RequestBounds, ServerSettings
from uso_engine.serving.wire_request import engine_request, wire_request

ALICE = {"Authorization": "Bearer alice-has-this-key"}


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
        with HTTP.stream("GET", ticket["status_url"] + "/stream") as followed, socket.socket() as waiting:
            body = json.dumps({**BODY, "prompt": "steps:100000"}).encode()
            waiting.connect(("127.0.0.1", served.port))
            headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            waiting.sendall(f"POST {PATH} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body)
            while "uso_engine_running 2.0" not in HTTP.get(f"{served.url}/metrics").text:
                pass
            served.process.terminate()
            while HTTP.get(f"{served.url}/readyz").status_code != 503:
                pass
            assert served.end() == 0
            with pytest.raises(httpx.TransportError):
                followed.read()
            with suppress(ConnectionError):
                assert waiting.recv(1) == b""  # No answer is better than a failure that was none.
    log = served.log.read_text()
    assert "ended without waiting" in log and "traceback" not in log.lower()
    assert {line["outcome"] for line in served.lines() if line.get("dialect") == "hosted"} == {"cancelled"}
    assert list((tmp_path / "storage" / "queue").glob("*.request.json"))


def test_who_follows_a_request_does_not_keep_a_drained_server(tmp_path: Path) -> None:
    made = application(tmp_path)

    async def asked(client: httpx.AsyncClient) -> None:
        ticket = (await client.post("/queue/fal-ai/uso", json={"prompt": "steps:100000"})).json()
        following = asyncio.create_task(client.get(ticket["status_url"] + "/stream"))
        engine = made.state.ready()
        assert isinstance(engine, DoubleEngine)
        while engine.running == 0:
            await asyncio.sleep(0)
        made.runner.stop()
        await made.state.drain(0.01)
        assert (await following).text.count("COMPLETED") == 0
        assert (await client.put(ticket["cancel_url"])).status_code == 202  # The double goes on.

    ask(made, asked)
