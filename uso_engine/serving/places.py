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
        most: requests that the engine holds.
        width: requests of the queue that are given to the engine at once.
    """

    def __init__(self, most: int, width: int) -> None:
        self._kept = min(width, most // 2)
        self._free = most - self._kept
        self._most = most

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A place, until the block ends.

        Raises:
            Refusal: 429, there is none.
        """
        if self._free == 0:
            direct = self._most - self._kept
            raise Refusal(
                429,
                "Too many requests at once.",
                errors=[f"{direct} are waited for, and {self._kept} of {self._most} places are kept for the queue"],
                retry_after_s=_RETRY_S,
            )
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1
