"""Whose turn it is: one request at a time, and none from inside another."""

from __future__ import annotations

import threading
from types import TracebackType


class Turn:
    """A lock that says so when its holder asks for it again, instead of waiting for itself for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        """Wait for the turn.

        Raises:
            RuntimeError: this thread has it already.
        """
        if self._holder == threading.get_ident():
            raise RuntimeError(
                "the engine is in the middle of a request of this thread: from on_step only engine.preview can be called; "
                "to end the request, call step.stop() or raise"
            )
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Hand it on."""
        self._holder = None
        self._lock.release()
