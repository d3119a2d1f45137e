"""A request as its caller sees it: what happens to it, in order, and how to end it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from uso_engine.api.events import Done, Event
from uso_engine.sampling.step import Step


@dataclass(frozen=True)
class StepTaken:
    """A step whose caller wants to look at it; the request takes no other until `RequestHandle.resume`."""

    step: Step


@dataclass(frozen=True)
class Failed:
    """How a request ended that has no result."""

    error: BaseException


Message = Event | StepTaken | Failed


class RequestHandle:
    """The messages of one request. The last one is `Done` or `Failed`; after it the engine holds nothing of the request.

    Args:
        wants_steps: whether the caller looks at every step before the next one is taken.
        wants_previews: whether steps come with a small picture.
        wants_events: whether the caller is told of anything but steps to look at and the end.
        deliver: called with every message in whatever thread it comes from, instead of keeping them for `next`; it must not
            wait. If it raises, the caller counts as gone.
    """

    def __init__(
        self,
        *,
        wants_steps: bool = False,
        wants_previews: bool = False,
        wants_events: bool = True,
        deliver: Callable[[Message], None] | None = None,
    ) -> None:
        self.wants_steps, self.wants_previews, self._wants_events = wants_steps, wants_previews, wants_events
        self._deliver = deliver
        self._messages: deque[Message] = deque()
        self._arrived = threading.Condition()
        self._on_change: Callable[[], None] | None = None
        self._ended = False
        self._accepted = self._cancelled = False
        self.looking = False
        """Whether the caller has a step to look at."""
        self.stopped = False
        """Whether the caller ended the run after a step."""

    @property
    def ended(self) -> bool:
        """Whether the last message was posted."""
        return self._ended

    @property
    def cancelled(self) -> bool:
        """Whether the caller wants no more of it."""
        return self._cancelled

    @property
    def accepted(self) -> bool:
        """Whether an engine knows of it."""
        return self._accepted

    def attach(self, on_change: Callable[[], None]) -> None:
        """An engine has accepted the request, and is to be told when the caller cancels or resumes."""
        self._on_change, self._accepted = on_change, True

    def post(self, message: Message) -> None:
        """Tell the caller."""
        self.looking = isinstance(message, StepTaken)
        last = isinstance(message, Done | Failed)
        if last:
            self._on_change = None
        try:
            if self._deliver is not None and (self._wants_events or last or self.looking):
                self._deliver(message)
        finally:
            with self._arrived:
                self._ended = self._ended or last
                if self._deliver is None and (self._wants_events or last or self.looking):
                    self._messages.append(message)
                self._arrived.notify_all()

    def next(self) -> Message:
        """Wait for the next message and take it."""
        with self._arrived:
            while not self._messages:
                self._arrived.wait()
            return self._messages.popleft()

    def resume(self, *, stopped: bool) -> None:
        """The caller has looked at a step; the next one may be taken, or none where it stopped the run."""
        self.stopped = self.stopped or stopped
        self.looking = False
        self._changed()

    def cancel(self) -> None:
        """Leave at the next step; `Failed` follows. Nothing happens to a request that has ended."""
        self._cancelled = True
        self._changed()

    def wait_until_ended(self) -> None:
        """Wait for the last message, whatever comes before it."""
        with self._arrived:
            while not self._ended:
                self._arrived.wait()

    def _changed(self) -> None:
        on_change = self._on_change
        if on_change is not None:
            on_change()
