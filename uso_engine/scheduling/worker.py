"""A thread for work beside denoising: conditioning, or decoding and checking."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(eq=False)
class Task:
    """Something to do.

    Args:
        run: does it; its errors are its own affair.
        size: smaller ones go first, every other time.
        abandon: told why it will not be done.
    """

    run: Callable[[], None]
    size: float
    abandon: Callable[[BaseException], None] | None = None


class Worker:
    """Does tasks one by one: in turn the oldest and the smallest, so that neither holds up the other.

    Args:
        name: of the thread.
        threaded: whether it has a thread; without one somebody else calls `run_one`.
        prepare: called in the thread before the first task.
        on_fault: told of an error that a task let through.
        on_task: told that there is a task, where there is no thread.
    """

    def __init__(
        self,
        name: str,
        *,
        threaded: bool,
        prepare: Callable[[], None],
        on_fault: Callable[[BaseException], None],
        on_task: Callable[[], None],
    ) -> None:
        self._name, self._threaded = name, threaded
        self._prepare, self._on_fault, self._on_task = prepare, on_fault, on_task
        self._tasks: list[Task] = []
        self._oldest_next = True
        self._stopped: BaseException | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def has_tasks(self) -> bool:
        """Whether anything is to be done."""
        return bool(self._tasks)

    def put(self, run: Callable[[], None], size: float = 0.0, abandon: Callable[[BaseException], None] | None = None) -> None:
        """Add a task; the first one starts the thread."""
        with self._changed:
            stopped = self._stopped
            if stopped is None:
                self._tasks.append(Task(run, size, abandon))
                self._changed.notify()
            if stopped is None and self._threaded and self._thread is None:
                # A daemon: whoever waits for a result keeps the process alive, an idle thread must not.
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        if stopped is not None and abandon is not None:
            abandon(stopped)
        if not self._threaded:
            self._on_task()

    def call(self, work: Callable[[], Result], size: float = 0.0) -> Future[Result]:
        """Add a task that has a result."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whoever asked for it gets it
                future.set_exception(error)

        self.put(run, size, lambda error: _give_up(future, error))
        return future

    def run_one(self) -> bool:
        """Do the next task, if there is one, in this thread."""
        task = self._take()
        if task is None:
            return False
        task.run()
        return True

    def stop(self, reason: BaseException) -> None:
        """End the thread after the task that runs; those that wait are not done any more, for a reason."""
        with self._changed:
            self._stopped = self._stopped or reason
            waiting, self._tasks = self._tasks, []
            self._changed.notify_all()
        for task in waiting:
            if task.abandon is not None:
                task.abandon(reason)

    def join(self) -> None:
        """Wait for the thread to end, from any other."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _take(self) -> Task | None:
        with self._changed:
            if not self._tasks:
                return None
            task = self._tasks[0] if self._oldest_next else min(self._tasks, key=lambda task: task.size)
            self._oldest_next = not self._oldest_next
            self._tasks.remove(task)
            return task

    def _run(self) -> None:
        try:
            self._prepare()
            while True:
                with self._changed:
                    while not self._tasks and self._stopped is None:
                        self._changed.wait()
                if not self.run_one() and self._stopped is not None:
                    return
        except BaseException as fault:  # noqa: BLE001 - of any type: those who wait have to hear of it
            self._on_fault(fault)


def _give_up(future: Future[Result], error: BaseException) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
