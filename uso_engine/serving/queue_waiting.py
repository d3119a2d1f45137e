"""A request of fal's queue that one server answers for, and what its client is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from .queue_records import QueuedRequest, QueueState, begun_state


@dataclass(order=True)
class WaitingRequest:
    """One request that this server answers for; they sort in the order in which they are taken.

    Args:
        rank: its priority, negated.
        id: its identifier, which begins with the time of its acceptance.
        state: where it stood at its acceptance, this server being its owner.
    """

    rank: int
    id: str
    state: QueueState = field(compare=False)
    running: asyncio.Task[None] | None = field(default=None, compare=False)
    ending: asyncio.Task[None] | None = field(default=None, compare=False)  # Of one that was cancelled before it was begun.
    cancelled: bool = field(default=False, compare=False)
    finishing: bool = field(default=False, compare=False)  # Its answer is being told: too late to cancel.


def waiting_of(request: QueuedRequest, owner: str) -> WaitingRequest:
    """A request as it waits at the server that answers for it."""
    return WaitingRequest(-request.priority, request.id, begun_state(request, owner))


@dataclass(frozen=True)
class QueueView:
    """What a client is told of a request.

    Args:
        state: where it stands.
        position: requests before it, while it waits.
    """

    state: QueueState
    position: int | None = None
