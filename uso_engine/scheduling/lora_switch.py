"""Other LoRAs in the weights: when no request of the present ones runs, for a request or for all that come later."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from .active import ActiveRequest, LoRAChange
from .handle import Failed
from .outcome import Outcome
from .queue import RequestQueue
from .stages import use_threads


class LoRASwitch:
    """Changes the weights between steps.

    Args:
        queue: whose scheduler says when.
        merge: merges LoRAs; the weights stay as they were where that fails.
    """

    def __init__(self, queue: RequestQueue, merge: Callable[[Hashable], None]) -> None:
        self._queue, self._merge = queue, merge

    def ask(self, loras: Hashable) -> LoRAChange:
        """Ask for other LoRAs for every request from now on; `LoRAChange.done` is answered when they are there.

        Raises:
            EngineClosedError, EngineDeadError: nothing is done any more.
        """

        def add() -> LoRAChange:
            self._queue.acceptance.check_alive()
            change = LoRAChange(0, 0, self._queue.clock(), loras=loras, ready=True)
            self._queue.scheduler.add(change)
            return change

        return self._queue.from_outside(add)

    def change(self, now_s: float) -> bool:
        """Change the weights where that is due, and answer those who wait for nothing else; whether there was anything."""
        with self._queue.lock:
            due = self._queue.scheduler.loras_due(now_s)
        if due is None:
            return self._answer()
        assert isinstance(due, ActiveRequest | LoRAChange)
        use_threads(due.threads)
        error = Outcome.of(self._merge, due.loras).error
        if error is not None:
            self._refuse(due.loras, error)
            return True
        with self._queue.lock:
            self._queue.scheduler.loras_changed(due.loras, self._queue.clock())
        self._queue.counters.lora_switches += 1
        return True

    def give_up(self, reason: Callable[[], BaseException]) -> None:
        """Answer everyone who waits with an error of its own."""
        for change in self._waiting():
            self._remove(change)
            change.done.give(Outcome(error=reason()))

    def _answer(self) -> bool:
        """Answer the changes whose LoRAs are in the weights."""
        answered = [change for change in self._waiting() if change.loras == self._queue.scheduler.loras]
        for change in answered:
            self._remove(change)
            self._queue.default_loras = change.loras
            change.done.give(Outcome())
        return bool(answered)

    def _refuse(self, loras: Hashable, error: BaseException) -> None:
        with self._queue.lock:
            wanting = [ticket for ticket in self._queue.scheduler.tickets if ticket.loras == loras]
        for ticket in wanting:
            if isinstance(ticket, ActiveRequest):
                self._queue.end(ticket, Failed(error))
            elif isinstance(ticket, LoRAChange):
                self._remove(ticket)
                ticket.done.give(Outcome(error=error))

    def _waiting(self) -> list[LoRAChange]:
        with self._queue.lock:
            return [ticket for ticket in self._queue.scheduler.tickets if isinstance(ticket, LoRAChange)]

    def _remove(self, change: LoRAChange) -> None:
        with self._queue.lock:
            self._queue.scheduler.remove(change)
