"""Whose turn it is: one request at a time, and none from inside another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")


class Turn:
    """A lock that says so when its holder asks for it again, and that an interrupt (Ctrl-C) never leaves held.

    Work is handed over as a function instead of a ``with`` statement: between a context manager's own methods and the
    statement's body there are places where an interrupt would end the caller but not the turn.
    """

    def __init__(self) -> None:
        # Reentrant for one reason: such a lock knows its holder, as part of taking it and giving it back.
        self._lock = threading.RLock()
        self._ownership = threading.Condition(self._lock)

    def take(self, work: Callable[[], Result]) -> Result:
        """Wait for the turn, work, and hand it on.

        Args:
            work: what is done while nobody else does anything.

        Returns:
            What the work returns.

        Raises:
            RuntimeError: this thread has the turn already.
        """
        if self._is_held_here():
            raise RuntimeError(
                "the engine is in the middle of a request of this thread: from on_step only engine.preview can be called; "
                "to end the request, call step.stop() or raise"
            )
        try:
            with self._lock:
                return work()
        finally:
            # An interrupt may come when the lock has just been taken and the statement does not cover it yet. The lock itself
            # knows: it refuses where it is not held by this thread, as after every other ending.
            with suppress(RuntimeError):
                self._lock.release()

    def _is_held_here(self) -> bool:
        try:
            self._ownership.notify()  # Nobody ever waits on it; it refuses a thread that does not hold the lock.
        except RuntimeError:
            return False
        return True
