"""A request of fal's queue that one server answers for, and what its client is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from .queue_records import QueueState


@dataclass(order=True)
class WaitingRequest:
    """One request that this server answers for; they sort in the order in which they are taken.

    Args:
        rank: its priority, negated.
        id: its identifier, which begins with the time of its acceptance.
        key: name of its caller's key.
        model: the name that it was sent to.
    """

    rank: int
    id: str
    key: str = field(compare=False)
    model: str = field(compare=False)
    running: asyncio.Task[None] | None = field(default=None, compare=False)
    ending: asyncio.Task[None] | None = field(default=None, compare=False)  # Of one that was cancelled before it was begun.
    cancelled: bool = field(default=False, compare=False)
    finishing: bool = field(default=False, compare=False)  # Its answer is being written: too late to cancel.


@dataclass(frozen=True)
class QueueView:
    """What a client is told of a request.

    Args:
        state: where it stands.
        position: requests before it, while it waits.
    """

    state: QueueState
    position: int | None = None
