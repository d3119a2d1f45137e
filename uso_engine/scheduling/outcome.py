"""What a function gave or raised, to be handed to another thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """A value, or an error in its place."""

    value: Value | None = None
    error: BaseException | None = None

    @staticmethod
    def of(work: Callable[[], Value]) -> Outcome[Value]:
        """Do something and keep what comes of it."""
        try:
            return Outcome(work())
        except BaseException as error:  # noqa: BLE001 - of any type: it is raised in the thread that asked for it
            return Outcome(error=error)

    def get(self) -> Value:
        """The value; raises the error where there is one."""
        if self.error is not None:
            raise self.error
        return cast("Value", self.value)


class Answer(Generic[Value]):
    """A place for one outcome that another thread waits for.

    Not a `concurrent.futures.Future`: an interrupt (Ctrl-C) of the thread that waits for one may leave its lock held, and
    whoever answers would wait for ever.
    """

    def __init__(self) -> None:
        self._outcomes: SimpleQueue[Outcome[Value]] = SimpleQueue()

    def give(self, outcome: Outcome[Value]) -> None:
        """Answer; the first answer counts."""
        self._outcomes.put(outcome)

    def wait(self) -> Value:
        """Wait for the answer, once; raises the error where there is one."""
        return self._outcomes.get().get()
