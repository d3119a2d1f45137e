"""A request as its caller sees it: what happens to it, in order, and how to end it.

The caller's side takes no locks: an interrupt (Ctrl-C) at any instruction of the caller's thread leaves nothing held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from uso_engine.api.events import Done, Event
from uso_engine.sampling.step import Step

from .threads import lend


@dataclass(frozen=True)
class StepTaken:
    """A step whose caller wants to look at it; the request takes no other until `RequestHandle.resume`."""

    step: Step


@dataclass(frozen=True)
class Failed:
    """How a request ended that has no result."""

    error: BaseException


Message = Event | StepTaken | Failed


def taken(message: Message, device: torch.device) -> Event | StepTaken:
    """A message as this thread gets it, with a result's tensors lent to it, or the error of a request that has no result.

    Args:
        message: whoever asks keeps no name of it, which the error would hold.
        device: of the engine.

    Raises:
        BaseException: the error.
    """
    if isinstance(message, Failed):
        try:
            raise message.error
        finally:
            del message
    if isinstance(message, Done):
        lend(device, message.result.latents)
    return message


def _nobody() -> None:
    """Nobody is told."""


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
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._deliver = self._messages.put if deliver is None else deliver
        self._notify = _nobody
        self.ended = False
        """Whether the last message was taken, or delivered."""
        self.cancelled = False
        """Whether the caller wants no more of it."""
        self.looking = False
        """Whether the caller has a step to look at."""
        self.stopped = False
        """Whether the caller ended the run after a step."""

    def attach(self, notify: Callable[[], None]) -> None:
        """Tell an engine from now on when the caller cancels or resumes."""
        self._notify = notify

    def post(self, message: Message) -> None:
        """Tell the caller."""
        last = isinstance(message, Done | Failed)
        if last:
            self._notify = _nobody
        self.looking = isinstance(message, StepTaken)
        if last or self.looking or self._wants_events:
            self._deliver(message)

    def next(self) -> Message:
        """Wait for the next message and take it."""
        message = self._messages.get()
        self.ended = isinstance(message, Done | Failed)
        return message

    def resume(self, *, stopped: bool) -> None:
        """The caller has looked at a step; the next one may be taken, or none where it stopped the run."""
        self.stopped = self.stopped or stopped
        self.looking = False
        self._notify()

    def cancel(self) -> None:
        """Leave at the next step; `Failed` follows. Nothing happens to a request that has ended."""
        self.cancelled = True
        self._notify()

    def wait_until_ended(self) -> None:
        """Wait for the last message, whatever comes before it."""
        while not self.ended:
            self.next()
