"""Work beside denoising, conditioning or decoding and checking: tasks, and the thread that does them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from .outcome import Answer, Outcome
from .threads import start_daemon, use_device

Result = TypeVar("Result")


@dataclass(eq=False)
class Task:
    """Something to do.

    Args:
        run: does it; its errors are its own affair.
        size: smaller ones go first, every other time.
        abandon: told why it will not be done.
        has_room: whether it may be done now, as memory goes; asked where there is no thread.
    """

    run: Callable[[], None]
    size: float = 0.0
    abandon: Callable[[BaseException], None] | None = None
    has_room: Callable[[], bool] = lambda: True


class Worker:
    """Does tasks one by one: in turn the oldest and the smallest, so that neither holds up the other.

    Args:
        name: of the thread.
        notify: told that there is a task.
    """

    def __init__(self, name: str, notify: Callable[[], None]) -> None:
        self.name, self._notify = name, notify
        self._arriving: SimpleQueue[Task] = SimpleQueue()
        self._tasks: list[Task] = []
        self._oldest_next = True
        self._stopped: Callable[[], BaseException] | None = None
        self._thread: threading.Thread | None = None

    def put(self, run: Callable[[], None], size: float = 0.0, *, has_room: Callable[[], bool] = lambda: True) -> None:
        """Add a task, from any thread."""
        self._add(Task(run, size, has_room=has_room))

    def _add(self, task: Task) -> None:
        self._arriving.put(task)
        self._notify()

    def call(self, work: Callable[[], Result]) -> Answer[Result]:
        """Add a task that somebody waits for, from any thread."""
        answer: Answer[Result] = Answer()
        self._add(Task(lambda: answer.give(Outcome.of(work)), abandon=lambda error: answer.give(Outcome(error=error))))
        if self._stopped is not None:  # Nobody may be there any more; if somebody is, the first answer counts.
            answer.give(Outcome(error=self._stopped()))
        return answer

    def run_one(self) -> bool:
        """Do the next task in this thread; whether there was one that could be done."""
        task = self._next()
        if task is None:
            return False
        self._oldest_next = not self._oldest_next
        self._tasks.remove(task)
        task.run()
        return True

    @property
    def can_run_one(self) -> bool:
        """Whether anything can be done now."""
        return self._next() is not None

    def _next(self) -> Task | None:
        self._take_in()
        if not self._tasks:
            return None
        if not self._tasks[0].has_room():
            self._oldest_next = True  # Nobody passes it: what becomes free is for it.
            return None
        smallest = min(self._tasks, key=lambda task: task.size)
        return self._tasks[0] if self._oldest_next or not smallest.has_room() else smallest

    def start(self, device: torch.device, on_fault: Callable[[BaseException], None]) -> bool:
        """Do tasks in a thread from now on.

        Args:
            device: that the tasks compute on.
            on_fault: told of an error that a task let through.

        Returns:
            Whether it could be started.
        """
        self._thread = start_daemon(self._run, self.name, device, on_fault)
        return self._thread is not None

    def stop(self, reason: Callable[[], BaseException]) -> None:
        """End the thread after the task that runs; those that wait are not done any more, each for a reason of its own."""
        self._stopped = self._stopped or reason
        self._arriving.put(Task(lambda: None))  # Wakes the thread.

    def end(self) -> None:
        """Wait for the thread to end, and give up the tasks that are left."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._stopped is not None and self._thread is not threading.current_thread():
            self._give_up(self._stopped)

    def _run(self, device: torch.device, on_fault: Callable[[BaseException], None]) -> None:
        def work() -> None:
            use_device(device)
            while self._stopped is None:
                if not self.run_one():
                    self._tasks.append(self._arriving.get())

        fault = Outcome.of(work).error
        if fault is not None:
            on_fault(fault)

    def _take_in(self) -> None:
        with suppress(Empty):
            while True:
                self._tasks.append(self._arriving.get_nowait())

    def _give_up(self, reason: Callable[[], BaseException]) -> None:
        self._take_in()
        waiting, self._tasks = self._tasks, []
        for task in waiting:
            if task.abandon is not None:
                task.abandon(reason())
