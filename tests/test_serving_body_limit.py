"""Bodies and answers in this process: what has come too late although it has come, and an end that nobody reads."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from uso_engine.serving.body_limit import BodyLimit, SlowReaderError
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


class StuffedTransport(asyncio.Transport):
    """The connection of a client that reads nothing: whatever is written waits."""

    protocol: asyncio.Protocol
    aborted = False

    def write(self, data: object) -> None:
        """It stays in the buffer."""

    def is_closing(self) -> bool:
        return self.aborted

    def close(self) -> None:
        """The end comes after what is in the buffer."""

    def abort(self) -> None:
        self.aborted = True
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def pause_reading(self) -> None:
        """Nothing comes."""

    def resume_reading(self) -> None:
        """Nothing comes."""


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


async def without_bound(scope: Scope, receive: Receive, send: Send) -> None:
    await plain(scope, receive, send)
    raise TimeoutError("another one")


@pytest.mark.parametrize("begun", [False, True], ids=["first bytes", "later"])
def test_a_client_that_does_not_read_loses_its_connection_without_a_traceback(
    begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one whose earlier answers fill the buffer, so that not even the first bytes of the next can be written."""
    bounds = Transport(idle_timeout_s=0.01)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"123", "more_body": True})
        transport.protocol.pause_writing()
        await send({"type": "http.response.body", "body": b"456"})

    async def served() -> None:
        state = ServerState()
        config = Config(BodyLimit(answer if begun else plain, bounds), log_config=None)
        config.load()
        protocol = transport.protocol = timed_protocol(bounds)(config, state, {})
        protocol.connection_made(transport)
        if not begun:
            protocol.pause_writing()
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(10):
            await asyncio.wait(state.tasks)
        assert transport.aborted and not state.connections

    transport = StuffedTransport()
    asyncio.run(served())
    assert [record.getMessage() for record in caplog.records] == []


def test_other_failures_of_an_answer_are_told_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    async def send(message: Message) -> None:
        raise TimeoutError("of the network")

    async def receive() -> Message:
        raise NotImplementedError

    with pytest.raises(TimeoutError, match="of the network"):
        asyncio.run(BodyLimit(plain, Transport())(SCOPE, receive, send))

    async def served() -> None:
        config, state, transport = Config(without_bound, log_config=None), ServerState(), StuffedTransport()
        config.load()
        protocol = transport.protocol = timed_protocol(Transport())(config, state, {})
        protocol.connection_made(transport)
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait(state.tasks)
        protocol.connection_lost(None)

    with caplog.at_level(logging.ERROR):
        asyncio.run(served())
    (record,) = caplog.records
    assert record.exc_info is not None and str(record.exc_info[1]) == "another one"


def test_how_much_was_sent_before_is_told() -> None:
    async def send(message: Message) -> None:
        if message.get("body") == b"3456":
            await asyncio.sleep(60)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for body in (b"12", b"3456"):
            await send({"type": "http.response.body", "body": body, "more_body": True})

    async def receive() -> Message:
        raise NotImplementedError

    with pytest.raises(SlowReaderError) as slow:
        asyncio.run(BodyLimit(answer, Transport(idle_timeout_s=0.01))(SCOPE, receive, send))
    assert (slow.value.waited_s, slow.value.sent_bytes) == (0.01, 2)
