"""An interruption at every hand-over of the event loop, one after the other: faults that need luck are found without it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")
Scenario = Callable[["Interruption"], Coroutine[Any, Any, None]]
MOST = 2000


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that can do something before the callback of a given number; its time can be put forward."""

    def __init__(self) -> None:
        self._skipped_s = 0.0
        self._left: dict[Callable[[], object], int] = {}
        super().__init__()
        self.complaints: list[dict[str, Any]] = []
        self.set_exception_handler(lambda loop, complaint: self.complaints.append(complaint))

    def before(self, callbacks: int, action: Callable[[], object]) -> None:
        """Do something once, when so many more callbacks have run."""
        self._left[action] = callbacks

    def forget(self, action: Callable[[], object]) -> bool:
        """Whether it was still to be done; now it is not."""
        return self._left.pop(action, None) is not None

    def skip(self, seconds: float) -> None:
        """What waits for a time within these seconds is due now."""
        self._skipped_s += seconds

    def time(self) -> float:
        return super().time() + self._skipped_s

    def call_soon(
        self, callback: Callable[[Unpack[Arguments]], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        return super().call_soon(self._counted, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Arguments]], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        return super().call_soon_threadsafe(self._counted, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self._counted, callback, *args, context=context)

    def _counted(self, callback: Callable[..., object], *args: object) -> None:
        due = [action for action, left in self._left.items() if left == 0]
        self._left = {action: left - 1 for action, left in self._left.items() if left}
        for action in due:
            action()
        callback(*args)


@dataclass
class Interruption:
    """What happens in one run of a scenario.

    Args:
        callbacks: of the loop that run before it happens.
        again: callbacks after which it happens once more; None for never.
    """

    callbacks: int
    again: int | None = None
    happened: bool = False

    async def of(self, work: Awaitable[T], action: Callable[[], object] | None = None) -> asyncio.Task[T]:
        """Run something, interrupt it, and wait until it has ended.

        Args:
            work: what is run.
            action: interrupts it; by default it is cancelled.
        """
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        task = asyncio.ensure_future(work)
        interrupt = task.cancel if action is None else action

        def first() -> None:
            self.happened = not task.done()
            interrupt()

        def second() -> None:
            interrupt()

        loop.before(self.callbacks, first)
        if self.again is not None:
            loop.before(self.callbacks + self.again, second)
        await asyncio.wait((task,))
        loop.forget(first)
        loop.forget(second)
        return task


def at_every_hand_over(scenario: Scenario, *, again: int | None = None) -> int:
    """Run a scenario until its work ends before it is interrupted, interrupted one callback later every time.

    When it is over no task may be left, and the loop may have complained of nothing: no exception was left unlooked at.

    Args:
        scenario: makes everything anew and calls `Interruption.of` once.
        again: callbacks after the first interruption at which there is a second one.

    Returns:
        How often it was interrupted.
    """
    for callbacks in range(MOST):
        interruption = Interruption(callbacks, again)
        with asyncio.Runner(loop_factory=CountingLoop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, CountingLoop)
            try:
                runner.run(_alone(scenario, interruption))
            except BaseException as error:
                error.add_note(f"interrupted before callback {callbacks}, and again after {again}")
                raise
            gc.collect(0)
            assert not loop.complaints, (callbacks, loop.complaints)
        if not interruption.happened:
            return callbacks
    raise AssertionError(f"the work has not ended after {MOST} callbacks")


async def _alone(scenario: Scenario, interruption: Interruption) -> None:
    await scenario(interruption)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, left
