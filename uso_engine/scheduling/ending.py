"""The interpreter's end: no thread may be inside PyTorch then."""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol


class Stoppable(Protocol):
    """Something with threads."""

    def stop(self) -> None:
        """End the threads, without waiting for them."""

    def join(self) -> None:
        """Wait for them to end."""


_running: weakref.WeakSet[Stoppable] = weakref.WeakSet()


def end_with_the_interpreter(threads: Stoppable) -> None:
    """Stop these when the interpreter ends; that is after every thread that waits for a result has ended."""
    _running.add(threads)


@atexit.register
def _stop_all() -> None:
    for threads in tuple(_running):
        threads.stop()
    for threads in tuple(_running):
        threads.join()
