"""Progress bars: bytes while loading, steps while denoising, with step time and time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .app import interrupts

if TYPE_CHECKING:
    from uso_engine.sampling.denoiser import Step


class LoadingProgress:
    """One line that says what is being loaded. Calling it is `uso_engine.assembly.LoadProgress`."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("loading {task.description}", markup=False),
            BarColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        self._task = self._bars.add_task("libraries", total=None)
        return self

    def __call__(self, part: str, done: int, total: int) -> None:
        assert self._task is not None
        interrupts.check()
        self._bars.update(self._task, description=part, completed=done, total=total or None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
        interrupts.check()


class GenerationProgress:
    """A bar over the steps with the last step's time and an estimate of what is left."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[step_time]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
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
        interrupts.check()
        now = time.perf_counter()
        # The first step's time would include encoding.
        step_time = f"{1000 * (now - self._last):.0f} ms/step" if step.index else ""
        self._last = now
        description = "denoising" if step.index + 1 < step.steps else "decoding"
        self._bars.update(self._task, description=description, completed=step.index + 1, total=step.steps, step_time=step_time)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
