"""The stages of a request beside denoising: conditioning before its first step, decoding and checking after its last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from uso_engine.api.events import Conditioning, Decoding, Done, Stepped
from uso_engine.sampling.step import Step
from uso_engine.stopwatch import Span

from .active import ActiveRequest, Stage, Work
from .handle import Failed
from .outcome import Arguments, Outcome, Value
from .queue import RequestQueue
from .stepping import out_of_memory
from .trace import Trace

if TYPE_CHECKING:
    from uso_engine.api.result import GenerationResult


def use_threads(count: int) -> None:
    """Compute in as many threads as the caller's PyTorch would: the autoencoder's last bits depend on it."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _finish(work: Work, request: ActiveRequest) -> GenerationResult:
    # An error goes on to hold the functions around the one that it was caught in, so none of those has the jobs by name.
    return work.finish(request.jobs, request.attention)


class Stages:
    """What workers do for a request. Each stage is run once, in one thread, and its error is the request's alone.

    Args:
        queue: that the requests are in.
        trace: where stretches of work are noted just now, if anywhere.
    """

    def __init__(self, queue: RequestQueue, trace: Callable[[], Trace | None]) -> None:
        self._queue, self._trace = queue, trace

    def condition(self, request: ActiveRequest) -> None:
        """Encode a request's inputs; it may take steps then."""
        work = self._begin(request, "conditioning")
        if work is None:
            return
        self._queue.tell(request, Conditioning())
        error = self._guarded(request, "conditioning", work.encode).error
        with self._queue.lock:
            error = error or self._queue.ending(request, self._queue.clock())
            if error is None:
                request.stage = "denoising"
        if error is not None:
            self._queue.end(request, Failed(error))
        self._queue.notify()

    def decode(self, request: ActiveRequest) -> None:
        """Turn a request's latents into its result."""
        work = self._begin(request, "decoding")
        if work is None:
            return
        self._queue.tell(request, Decoding())
        outcome = self._guarded(request, "decoding", _finish, work, request)
        error = outcome.error
        with self._queue.lock:
            # Late by a little is no reason to throw away what is done.
            given_up = request.doom is not None or request.handle.cancelled
            error = error or (self._queue.ending(request, self._queue.clock()) if given_up else None)
        self._queue.end(request, Failed(error) if error is not None else Done(outcome.get()))

    def preview(self, request: ActiveRequest, step: Step) -> None:
        """Show where a request is heading, unless a later step is there already."""
        work, picture = request.work, None
        if work is None:
            return
        if request.last_step is step:
            outcome = self._guarded(request, "preview", work.preview, step)
            request.doom, picture = request.doom or outcome.error, outcome.value
        self._queue.tell(request, Stepped(step.index, step.steps, picture))

    def _begin(self, request: ActiveRequest, stage: Stage) -> Work | None:
        """The work of a request that is still wanted."""
        with self._queue.lock:
            work, error = request.work, self._queue.ending(request, self._queue.clock())
            if error is None:
                request.stage = stage
        if error is not None:
            self._queue.end(request, Failed(error))
            return None
        return work

    def _guarded(
        self,
        request: ActiveRequest,
        name: str,
        run: Callable[Arguments, Value],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Outcome[Value]:
        """Do a stage; what went wrong, in the caller's terms."""
        span = Span()
        use_threads(request.threads)
        outcome = Outcome.of(run, *arguments, **named)
        trace = self._trace()
        if trace is not None:
            trace.add(name, f"request {request.number}", span.start_s, span.end().end_s)
        if isinstance(outcome.error, torch.OutOfMemoryError):
            return Outcome(error=out_of_memory(outcome.error, name))
        return outcome
