"""Trying again where it is the server that failed: a storage that is away, an engine that is not ready."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from .refusal import refusal_of

T = TypeVar("T")
_MOST_TRIES = 5
_RETRY_S = 2.0


async def tried(work: Callable[[], Awaitable[T]]) -> T:
    """Do something, and again where it is the server that failed, for some seconds.

    Raises:
        Refusal: what is to be answered.
    """
    for attempt in range(_MOST_TRIES):
        try:
            return await work()
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status != 503 or attempt == _MOST_TRIES - 1:
                raise refusal from error
        await asyncio.sleep(_RETRY_S)
    raise AssertionError("the last try returns or raises")
