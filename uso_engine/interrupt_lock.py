"""A lock that an interrupt (Ctrl-C) never leaves held, and that refuses the thread that holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")


class InterruptSafeLock:
    """A lock around work that is handed over as a function.

    A ``with`` statement would not do: between a context manager's own methods and the statement's body there are places where
    an interrupt would end the caller but leave the lock held.
    """

    def __init__(self) -> None:
        # Reentrant for one reason: such a lock knows its holder, as part of taking it and giving it back.
        self._lock = threading.RLock()
        self._ownership = threading.Condition(self._lock)

    def run(self, work: Callable[[], Result]) -> Result:
        """Wait for the lock, work, and give it back.

        Args:
            work: what is done while no other thread works under this lock.

        Returns:
            What the work returns.

        Raises:
            RuntimeError: this thread holds the lock already.
        """
        if self._is_held_here():
            raise RuntimeError("this thread works under the lock already; waiting for itself it would never end")
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
