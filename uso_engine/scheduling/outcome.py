"""What a function gave or raised, to be handed to another thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, ParamSpec, TypeVar, cast

from uso_engine.loading.device import let_go

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """A value, or an error in its place."""

    value: Value | None = None
    error: BaseException | None = None

    @staticmethod
    def of(work: Callable[Arguments, Value], *arguments: Arguments.args, **named: Arguments.kwargs) -> Outcome[Value]:
        """Do something and keep what comes of it; an error holds nothing of what was being done (`let_go`).

        Args:
            work: does it. What a function has from those around it an error goes on to hold, so it is given arguments; likewise
                what the functions that called this one still name when they end.
            arguments: that it is given.
            named: likewise.
        """
        try:
            return Outcome(work(*arguments, **named))
        except BaseException as error:  # noqa: BLE001 - of any type: it is raised in the thread that asked for it
            del work, arguments, named  # This function is one of those that the error came through.
            let_go(error)
            return Outcome(error=error)

    def get(self) -> Value:
        """The value; raises the error where there is one."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # Which the error would hold, and it the error.
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
