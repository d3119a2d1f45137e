"""The engine's places, shared between requests that somebody waits for and those of the durable queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .refusal import Refusal

_RETRY_S = 2.0


class Places:
    """Counts requests that a connection waits for: they may not take the places that are kept for the queue.

    The queue gives the engine no more than its width at once, so neither can keep the other out; among those that the engine
    has, its scheduler shares the steps.

    Args:
        width: requests of the queue that are given to the engine at once.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._taken = 0

    @contextmanager
    def taken(self, most: int) -> Iterator[None]:
        """A place, until the block ends.

        Args:
            most: requests that the engine holds now; replicas come and go.

        Raises:
            Refusal: 429, there is none.
        """
        kept = min(self._width, most // 2)
        if self._taken >= most - kept:
            raise Refusal(
                429,
                "Too many requests at once.",
                errors=[f"{self._taken} are waited for, and {kept} of {most} places are kept for the queue"],
                retry_after_s=_RETRY_S,
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
