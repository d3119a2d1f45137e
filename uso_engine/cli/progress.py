"""Progress bars of the command line: bytes while loading, steps while denoising."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from uso_engine.progress import StepProgress

from .console import interrupts

if TYPE_CHECKING:
    from uso_engine.sampling.step import Step


class LoadingProgress:
    """One line that says what is being loaded. Calling it is `uso_engine.loading.assembly.LoadProgress`."""

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


class GenerationProgress(StepProgress):
    """The bar over the steps, which an interrupt ends between two of them."""

    def on_step(self, step: Step) -> None:
        interrupts.check()
        super().on_step(step)
