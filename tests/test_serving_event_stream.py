"""Events as an answer: whoever leaves, at whatever moment, ends what makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from uso_engine.serving.body_limit import BodyLimit
from uso_engine.serving.event_stream import EventResponse, with_beats
from uso_engine.serving.settings import Transport

MOST = 200
SCOPE: Scope = {"type": "http", "headers": []}


async def sent_before_the_end(leaves_in: int) -> int:
    """Events that a client gets which leaves after so many turns of the loop."""
    made = 0
    left = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal made
        for made in range(MOST):  # noqa: B007  counted for the assertion
            await asyncio.sleep(0)
            yield b"event"

    async def receive() -> Message:
        if not left.is_set():
            left.set()
            return {"type": "http.request", "body": b"", "more_body": False}
        for _ in range(leaves_in):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await EventResponse(with_beats(events()))(scope, receive, send)

    with pytest.raises(ClientDisconnect):
        await BodyLimit(answer, Transport())(SCOPE, receive, send)
    return made


@pytest.mark.parametrize("leaves_in", range(24))
def test_a_client_that_leaves_in_any_turn_of_the_loop_ends_its_events(leaves_in: int) -> None:
    # A cancellation that comes in the turn in which a send is done must not be lost: the events would go on to their end.
    assert asyncio.run(sent_before_the_end(leaves_in)) <= leaves_in + 1
