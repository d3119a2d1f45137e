"""A request from a thread that waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from uso_engine.api.events import Done
from uso_engine.api.result import GenerationResult
from uso_engine.generation import Generation
from uso_engine.process_state import clean_process_state
from uso_engine.sampling.step import OnStep, show
from uso_engine.sampling.watched_steps import WatchedSteps

from .handle import Failed, RequestHandle, StepTaken, taken
from .loop import RequestLoop
from .machine import company_of
from .threads import hand_over, in_order, lend

_callbacks = threading.local()


@contextmanager
def inside_on_step() -> Iterator[None]:
    """What the calling thread does now is done inside a caller's `on_step`."""
    _callbacks.running = True
    try:
        yield
    finally:
        _callbacks.running = False


def refuse_inside_on_step() -> None:
    """Refuse what would wait for a request that waits for this thread.

    Raises:
        RuntimeError: the calling thread is inside `on_step`.
    """
    if getattr(_callbacks, "running", False):
        raise RuntimeError(
            "the engine is in the middle of a request of this thread: from on_step only engine.preview can be called; "
            "to end the request, call step.stop() or raise"
        )


def put_in_line(
    loop: RequestLoop, handle: RequestHandle, generation: Generation, priority: int, timeout_s: float | None
) -> None:
    """Accept a request, open its inputs in this thread, and put it in line.

    Raises:
        QueueFullError, EngineClosedError, EngineDrainingError, EngineDeadError: it is not accepted.
        ImageError and others: see `Generation.open`.
    """
    request = loop.queue.accept(handle, priority=priority, timeout_s=timeout_s)
    try:
        generation.open()
        tokens, company = generation.size().rows, company_of(generation)
        loop.queue.enqueue(request, generation, tokens=tokens, company=company, loras=generation.loras)
    except BaseException as error:  # Ctrl-C too
        failed = Failed(error)
        loop.queue.from_outside(lambda: loop.queue.end(request, failed))
        raise
    hand_over(loop.device)
    loop.submit(request)


def look(message: StepTaken, on_step: OnStep, handle: RequestHandle, device: torch.device) -> None:
    """Show a caller a step in this thread, then let the request go on.

    Args:
        message: that a step was taken.
        on_step: the caller's.
        handle: of the request.
        device: of the engine.

    Raises:
        ValueError: something else than latents was left in the step.
        Exception: whatever `on_step` raises.
    """
    lend(device, *message.step.velocities)
    with inside_on_step(), in_order(device):
        show(message.step, on_step)
    handle.resume(stopped=message.step.stopped)


def wait_for(
    loop: RequestLoop,
    generation: Generation,
    *,
    on_step: OnStep | None = None,
    priority: int = 0,
    timeout_s: float | None = None,
) -> GenerationResult:
    """Put a request in line and wait for its result; an interrupt (Ctrl-C) or an error of `on_step` cancels it.

    Args:
        loop: of the engine.
        generation: the request.
        on_step: called in this thread after each step, while other requests go on.
        priority: higher goes first; 0 is usual.
        timeout_s: seconds that the request has, if less than the configuration gives it.

    Raises:
        RequestTimeoutError: it was not done, or not begun, in the time it had.
        Exception: as for `put_in_line`, and whatever its stages or `on_step` raise.
    """
    handle = RequestHandle(wants_steps=on_step is not None, wants_events=False)
    watched = None if on_step is None else WatchedSteps(on_step)
    generation.watched = watched
    try:
        put_in_line(loop, handle, generation, priority, timeout_s)
        with clean_process_state():
            while True:
                message = taken(handle.next(), loop.device)
                if isinstance(message, Done):
                    return message.result
                if isinstance(message, StepTaken) and watched is not None:
                    look(message, watched, handle, loop.device)
                del message  # Which an error would hold, and its latents.
    finally:
        if not handle.ended:
            loop.give_up(handle)
