"""Requests over HTTP that are broken off at every hand-over of the event loop: everything that they held is given back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from living_application import BODY, application
from loop_turns import Interruption, at_every_hand_over
from served_double import DoubleEngine
from starlette.types import Message, Scope

from uso_engine.config import load_config
from uso_engine.serving import service as serving
from uso_engine.serving.app import Application
from uso_engine.serving.request_limit import RequestLimit
from uso_engine.serving.settings import ServerSettings

PATHS = {
    "answer": ("/v1/images/generations", BODY),
    "stream": ("/v1/images/generations?stream=true", BODY),
    "fal": ("/run/fal-ai/uso", {"prompt": "", "image_size": BODY["image_size"], "seed": 1}),
}


@dataclass
class Client:
    """One request as a server of HTTP tells an application of it.

    Args:
        path: with its query.
        body: JSON.
    """

    path: str
    body: dict[str, object]
    left: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[Message] = field(default_factory=list)
    begun: list[Message] = field(default_factory=list)
    asked: bool = False

    @property
    def scope(self) -> Scope:
        path, _, query = self.path.partition("?")
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        return {"type": "http", "method": "POST", "path": path, "query_string": query.encode(), "headers": headers} | {
            "scheme": "http",
            "http_version": "1.1",
            "root_path": "",
        }

    async def receive(self) -> Message:
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.begun.append(message)
        await asyncio.sleep(0)
        self.sent.append(message)

    @property
    def may_know_an_image(self) -> bool:
        return b".png" in b"".join(message.get("body", b"") for message in self.begun)

    @property
    def said(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


@dataclass
class Spans:
    """Spans that were begun and ended."""

    begun: int = 0
    ended: int = 0

    @contextmanager
    def one(self, *arguments: Any) -> Iterator[Any]:
        self.begun += 1
        try:
            yield self
        finally:
            self.ended += 1

    def done(self, result: object) -> None:
        """Nothing is noted."""

    def failed(self, error: BaseException) -> None:
        """Nothing is noted."""


def held(made: Application) -> dict[str, float]:
    """What requests hold: places, requests of a caller, bytes of bodies."""
    service = made.runner._service
    lines = [line for line in service.metrics.text().decode().splitlines() if line.startswith("uso_body_bytes ")]
    asgi: Any = made.asgi
    limit = asgi._app._app
    assert isinstance(limit, RequestLimit)
    return {
        "requests": limit.running,
        "places": service._places._taken,
        "running": service.limits._running.total(),
        "bytes": float(lines[0].split()[1]),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """An application that is ready without its life: what is looked at belongs to one request alone."""
    made = application(tmp_path_factory.mktemp("storage"), ServerSettings(page=False, concurrent=2))
    made.state._phase = "ready"
    yield made
    made.runner._service.close()


@pytest.mark.parametrize("again", [None, 1, 3])
@pytest.mark.parametrize("leaves", [False, True], ids=["cancelled", "client leaves"])
@pytest.mark.parametrize("way", PATHS)
def test_a_request_that_is_broken_off_holds_nothing_any_more(
    way: str, leaves: bool, again: int | None, made: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans, answers = Spans(), list[bytes]()
    monkeypatch.setattr(serving, "generation_span", spans.one)

    async def scenario(interruption: Interruption) -> None:
        engine = made.state._engine = DoubleEngine(load_config("uso-tiny"))
        client = Client(*PATHS[way])
        work = made.asgi(client.scope, client.receive, client.send)
        task = await interruption.of(work, client.left.set if leaves else None)
        assert held(made) == {"requests": 0, "places": 0, "running": 0, "bytes": 0}
        assert engine.running == 0
        assert spans.begun == spans.ended
        files = made.runner._service.files
        stored = files._storage.names("files")
        assert len(stored) == client.may_know_an_image
        for name in stored:
            files.remove(name)
        if not interruption.happened:
            task.result()
            answers.append(client.said)

    assert at_every_hand_over(scenario, again=again) > 20
    assert b".png" in answers[0]
