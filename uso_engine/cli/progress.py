"""Progress bars of the command line: bytes while loading, steps while denoising."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from uso_engine.progress import GenerationProgress as GenerationProgress


class LoadingProgress:
    """One line that says what is being loaded. Calling it is `uso_engine.assembly.LoadProgress`."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(TextColumn("loading {task.description}"), BarColumn(), console=console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        self._task = self._bars.add_task("libraries", total=None)
        return self

    def __call__(self, part: str, done: int, total: int) -> None:
        assert self._task is not None
        self._bars.update(self._task, description=part, completed=done, total=total or None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
