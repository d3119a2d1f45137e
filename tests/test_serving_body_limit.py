"""Bodies and answers in this process: what has come too late although it has come, and an end that nobody reads."""

from __future__ import annotations

import asyncio
import socket

import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from uso_engine.serving.body_limit import BodyLimit
from uso_engine.serving.refusal import Refusal
from uso_engine.serving.settings import Transport
from uso_engine.serving.timed_protocol import timed_protocol

SCOPE: Scope = {"type": "http", "headers": []}


async def discard(message: Message) -> None:
    return None


def test_a_body_that_is_late_is_refused_though_its_next_piece_lies_here() -> None:
    """A client that is always ahead of the reader never makes it wait, so no time limit of a wait ends it."""
    now, pieces = [0.0], 0

    async def receive() -> Message:
        nonlocal pieces
        pieces += 1
        now[0] += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(10):
            await receive()

    limited = BodyLimit(answer, Transport(body_timeout_s=3), lambda: now[0])
    with pytest.raises(Refusal, match="did not come in time") as refused:
        asyncio.run(limited(SCOPE, receive, discard))
    assert (refused.value.status, pieces, limited.held_bytes) == (408, 3, 0)


def test_an_end_that_nobody_reads_is_not_waited_for_for_ever() -> None:
    """An answer breaks off with more written than the client's buffers take; its connection has to end nevertheless."""

    async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending = asyncio.ensure_future(send({"type": "http.response.body", "body": bytes(64 << 20), "more_body": True}))
        await asyncio.wait({sending}, timeout=0)
        assert not sending.done()
        sending.cancel()
        raise TimeoutError

    async def served() -> None:
        config, state = Config(breaks_off, log_config=None), ServerState()
        config.load()
        protocol = timed_protocol(Transport(idle_timeout_s=0.01))
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
        async with server:
            with socket.create_connection(server.sockets[0].getsockname()) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                async with asyncio.timeout(10):
                    while not state.connections:
                        await asyncio.sleep(0)
                    while state.connections:
                        await asyncio.sleep(0.001)

    asyncio.run(served())
