"""A progress bar over the denoising steps, with step time and time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .sampling.step import OnStep, Step


class StepProgress:
    """A bar over the steps with the last step's time and an estimate of what is left; gone when it ends, and never
    written to a file.

    Args:
        console: where to; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        shown_on = console if console is not None else Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[step_time]}"),
            TimeRemainingColumn(),
            console=shown_on,
            transient=True,
            disable=not (shown_on.is_terminal or shown_on.is_jupyter),
        )
        self._task: TaskID | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        self._task = self._bars.add_task("encoding", total=None, step_time="")
        self._last = time.perf_counter()
        return self

    def on_step(self, step: Step) -> None:
        """To be given to `USOEngine.generate`."""
        assert self._task is not None
        now = time.perf_counter()
        # The first step's time would include encoding.
        step_time = f"{1000 * (now - self._last):.0f} ms/step" if step.index else ""
        self._last = now
        description = "denoising" if step.index + 1 < step.steps else "decoding"
        self._bars.update(self._task, description=description, completed=step.index + 1, total=step.steps, step_time=step_time)

    def beside(self, on_step: OnStep | None) -> OnStep:
        """This bar and another function after each step, which comes first and may raise."""

        def both(step: Step) -> None:
            if on_step is not None:
                on_step(step)
            self.on_step(step)

        return both

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
