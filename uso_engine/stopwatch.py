"""How long each stage of a request takes, without making the host wait for the device.

On a GPU a stage is timed by events in its stream, which are read when the request's images are on the host. Work of other
requests that lies between them in the stream counts as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Span:
    """A stretch of work, from when this is made until `end`.

    Args:
        device: where the work is done; None for work of the host alone.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device is not None and device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(torch.cuda.current_stream(device))
        self._device = device
        self.start_s = self.end_s = time.perf_counter()

    def end(self) -> Span:
        """End it here."""
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self._device))
        self.end_s = time.perf_counter()
        return self

    def wait(self) -> None:
        """Wait until the device has come to its end."""
        if self._events is not None:
            self._events[1].synchronize()

    @property
    def seconds(self) -> float:
        """Its length; waits for the device."""
        if self._events is None:
            return self.end_s - self.start_s
        self.wait()
        return self._events[0].elapsed_time(self._events[1]) / 1000


class Stopwatch:
    """Seconds of each stage of a request, from when this is made.

    Args:
        device: where its stages run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started_s = time.perf_counter()
        self._spans: dict[str, list[Span]] = {}

    @contextmanager
    def stage(self, name: str, *, on_device: bool = True) -> Iterator[None]:
        """Time a stage, or one that the device has no part in."""
        span = Span(self.device if on_device else None)
        try:
            yield
        finally:
            self.add(name, span.end())

    def add(self, name: str, span: Span) -> None:
        """Count a stretch that was timed elsewhere, such as a step that the request shared."""
        self._spans.setdefault(name, []).append(span)

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage in order, ``queue`` first: what no stage accounts for. They add up to the time until now."""
        stages = {name: sum(span.seconds for span in spans) for name, spans in self._spans.items()}
        whole = time.perf_counter() - self.started_s
        return {"queue": max(0.0, whole - sum(stages.values())), **stages}
